"""From the command line to evaluations: everything is found and checked before the first."""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emanet_triton.errors import InputError
from emanet_triton.eval.cityscapes import Sample, find_samples
from emanet_triton.eval.inference import HALF
from emanet_triton.eval.ranks import Ranks
from emanet_triton.eval.runner import Outputs, check_samples, require_writable
from emanet_triton.eval.scenes import demo_dataset
from emanet_triton.models.checkpoint import Checkpoint, load_into, read_checkpoint
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import FusedEMANet, fuse
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import (
    DEMO,
    ZOO,
    create_model,
    find_entry,
    list_models,
    name_of,
    read_published,
)

_VAL_IMAGES = 500  # of Cityscapes, on which the published figures were measured


@dataclass(frozen=True)
class Job:
    """One evaluation: a checkpoint under a protocol, with or without ms+flip.

    Attributes:
        name: of the model in the zoo.
        checkpoint: its weights.
        protocol: resizes and windows.
        ms_flip: average over scales and mirroring.
        reconstruct: False leaves out the EM attention's reconstruction.
    """

    name: str
    checkpoint: Checkpoint
    protocol: Protocol
    ms_flip: bool
    reconstruct: bool = True

    def load(self, device: torch.device) -> EMANet:
        """The network on its device.

        Raises:
            InputError: the weights do not fit.
        """
        model = create_model(self.name)
        load_into(model, self.checkpoint)
        if not self.reconstruct:
            model.decode_head.fixed_reconstruction = torch.zeros(1)
        return model.to(device)

    def load_fused(self, device: torch.device, precision: str) -> FusedEMANet:
        """The inference network on its device, in the dtype of ``precision``.

        The checkpoint is released: the network that it is made from shares its memory.

        Raises:
            InputError: the weights do not fit.
        """
        model = create_model(self.name)
        load_into(model, self.checkpoint, share=True)
        self.checkpoint.release()
        return fuse(model.to(device), dtype=HALF.get(precision, torch.float32))

    def published(self, split: str, images: int) -> float | None:
        """The published mIoU in percent that this job should reproduce, if there is one."""
        entry = ZOO[self.name]
        same = (
            self.checkpoint.sha256.startswith(entry.sha256)
            and (split, images) == ("val", _VAL_IMAGES)
            and self.reconstruct
        )
        if entry.published is None or not same:
            return None
        return entry.published.miou_ms_flip if self.ms_flip else entry.published.miou


@dataclass(frozen=True)
class Plan:
    """All that a command line asks for, checked.

    Attributes:
        jobs: the evaluations, in order.
        data: root of the data set.
        samples: of its split.
        device: to run on.
        outputs: folders for pictures.
        demo: whether this is the synthetic demonstration.
        fused: whether to run the inference networks that ``fuse`` makes.
    """

    jobs: list[Job]
    data: Path
    samples: list[Sample]
    device: torch.device
    outputs: Outputs
    demo: bool
    fused: bool

    def load(self, job: Job, precision: str) -> nn.Module:
        """The network that a job runs; an ablation is never fused."""
        if self.fused and job.reconstruct:
            return job.load_fused(self.device, precision)
        return job.load(self.device)

    def outputs_of(self, job: Job) -> Outputs:
        """Pictures are drawn of the network itself, not of its ablation."""
        return self.outputs if job.reconstruct else Outputs()

    def settings(self, job: Job, args: Namespace) -> dict[str, Any]:
        """What determines the result of a job and what it writes; a partial result's identity."""
        outputs = self.outputs_of(job)
        folders = (outputs.predictions, outputs.overlays)
        return {
            "model": job.name,
            "sha256": job.checkpoint.sha256,
            "protocol": asdict(job.protocol),
            "ms_flip": job.ms_flip,
            "reconstruct": job.reconstruct,
            "data": str(self.data.resolve()),
            "split": args.split,
            "samples": [sample.name for sample in self.samples],
            "precision": args.precision,
            "fused": self.fused,
            "device": self.device.type,
            "outputs": [folder and str(folder.resolve()) for folder in folders],
        }


def make_plan(args: Namespace, ranks: Ranks) -> Plan:
    """Find and check everything that the arguments name.

    Raises:
        InputError: what is missing, damaged or does not fit.
    """
    device = _device(args.device, args.precision, ranks)
    outputs = Outputs(args.save_predictions, args.save_overlays)
    outputs.prepare()
    if args.json:
        require_writable(args.json)
    jobs = _jobs(args)
    for job in {job.name: job for job in jobs}.values():
        job.load(torch.device("meta"))
    demo = args.data is None and all(job.name == DEMO for job in jobs)
    if args.data is None and not demo:
        raise InputError("--data is missing; expected the root of Cityscapes")
    data = demo_dataset() if args.data is None else args.data
    samples = find_samples(data, args.split, args.limit)
    check_samples(samples, ranks, args.workers)
    # On a GPU the fused network has not been run yet, so there the plain one is the default.
    fused = device.type == "cpu" if args.fuse is None else args.fuse
    return Plan(jobs, data, samples, device, outputs, demo, fused)


def _jobs(args: Namespace) -> list[Job]:
    def job(name: str, checkpoint: Checkpoint, ms_flip: bool, reconstruct: bool = True) -> Job:
        protocol = replace(ZOO[name].protocol, version=args.protocol)
        return Job(name, checkpoint, protocol, ms_flip, reconstruct)

    if args.all:
        published = [name for name in list_models() if ZOO[name].published]
        checkpoints = {name: read_published(name, args.ckpt) for name in published}
        return [job(name, checkpoints[name], ms) for ms in (False, True) for name in published]
    if args.ckpt is None and args.data is None:
        demo = read_published(DEMO)
        return [job(DEMO, demo, args.ms_flip, reconstruct) for reconstruct in (True, False)]
    if args.ckpt is None:
        raise InputError(
            "--ckpt is missing; expected a checkpoint file or one of: " + ", ".join(list_models())
        )
    name, checkpoint = _named_checkpoint(args.ckpt, args.model)
    return [job(name, checkpoint, args.ms_flip)]


def _named_checkpoint(ckpt: str, model: str | None) -> tuple[str, Checkpoint]:
    """The checkpoint that ``--ckpt`` means, and which model it is of."""
    if model is not None:
        find_entry(model)
    if ckpt in ZOO and not Path(ckpt).exists():
        if model not in (None, ckpt):
            raise InputError(f"--ckpt {ckpt} is not a checkpoint of --model {model}")
        return ckpt, read_published(ckpt)
    if not Path(ckpt).exists() and Path(ckpt).suffix == "":
        raise InputError(
            f"{ckpt}: no such file and no such model; expected a checkpoint file or one of: "
            + ", ".join(list_models())
        )
    checkpoint = read_checkpoint(ckpt)
    name = model or name_of(checkpoint)
    if name is None:
        raise InputError(
            f"{ckpt}: neither its name nor its hash is of a published file; expected --model with "
            "one of: " + ", ".join(list_models())
        )
    return name, checkpoint


def _device(name: str | None, precision: str, ranks: Ranks) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {name}: no such device here ({reason}); expected cpu or cuda[:N]"
        ) from None
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"--precision tf32: expected a CUDA device, got {device}")
    return device
