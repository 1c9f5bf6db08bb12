"""From the command line to evaluations: everything is found and checked before the first."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emanet_triton.cores import usable_cores
from emanet_triton.data.cityscapes import Sample, find_samples
from emanet_triton.data.scenes.generate import demo_dataset
from emanet_triton.errors import InputError, first_line
from emanet_triton.eval.outputs import Outputs, keep_out, refuse_overwriting
from emanet_triton.eval.partial import Stamp, stamps
from emanet_triton.eval.ranks import Ranks
from emanet_triton.eval.runner import check_samples
from emanet_triton.files import require_writable
from emanet_triton.inference.predictor import HALF, Predictor
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.loading import load_into
from emanet_triton.models.network import FusedNetwork, Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse
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

    def load(self, device: torch.device, share: bool = False) -> Network:
        """The network on its device; with ``share`` in the checkpoint's memory and dtypes.

        Raises:
            InputError: the weights do not fit.
        """
        model = create_model(self.name)
        load_into(model, self.checkpoint, share)
        if not self.reconstruct:
            model.get_submodule("decode_head").fixed_reconstruction = torch.zeros(1)
        return model.to(device)

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
        stamps: of the samples' files before they were checked.
        device: to run on.
        threads: for PyTorch's operations on the CPU.
        outputs: folders for pictures.
        demo: whether this is the synthetic demonstration.
    """

    jobs: list[Job]
    data: Path
    samples: list[Sample]
    stamps: dict[str, Stamp]
    device: torch.device
    threads: int
    outputs: Outputs
    demo: bool

    def predictor(self, job: Job, args: Namespace, precision: str) -> Predictor:
        """A job's network at work in a precision; an ablation is never fused."""
        fused = args.fuse and job.reconstruct and precision != "tf32"
        network = job.load(self.device, share=fused and self.device.type == "cpu")
        job.checkpoint.release()
        if fused:
            network = verified_fuse(network, HALF.get(precision, torch.float32))
            if not isinstance(network, FusedNetwork):
                network.float()  # its tensors may still be the checkpoint's
        return Predictor(
            network,
            job.protocol,
            ms_flip=job.ms_flip,
            precision=precision,
            batch_size=args.batch_size,
            compile=args.compile,
            cuda_graphs=args.cuda_graphs,
        )

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
            "compare": args.compare,
            "fuse": args.fuse,
            "compile": args.compile,
            "device": self.device.type,
            "outputs": [folder and str(folder.resolve()) for folder in folders],
        }


def make_plan(args: Namespace, ranks: Ranks) -> Plan:
    """Find and check everything that the arguments name.

    Raises:
        InputError: what is missing, damaged or does not fit.
    """
    device = _device(args.device, (args.precision, args.compare), ranks)
    outputs = Outputs(args.save_predictions, args.save_overlays)
    places = outputs.folders() | {"--json": args.json}
    if args.data:  # before a folder is made in it
        keep_out(args.data, places)
    outputs.prepare()
    if args.json:
        require_writable(args.json)
    jobs = _jobs(args)
    for job in {job.name: job for job in jobs}.values():
        job.load(torch.device("meta"))
        if args.all:  # four networks at once would be a gigabyte
            job.checkpoint.release()
    demo = args.data is None and all(job.name == DEMO for job in jobs)
    if args.data is None and not demo:
        raise InputError("--data is missing; expected the root of Cityscapes")
    data = demo_dataset() if args.data is None else args.data
    keep_out(data, places)
    samples = find_samples(data, args.split, args.limit)
    refuse_overwriting(outputs, args.json, samples, [job.checkpoint.path for job in jobs])
    stamped = stamps(samples)
    check_samples(samples, ranks, args.workers)
    threads = args.threads or max(1, usable_cores() // ranks.local_count)
    return Plan(jobs, data, samples, stamped, device, threads, outputs, demo)


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


def _device(name: str | None, precisions: Sequence[str | None], ranks: Ranks) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{ranks.local_rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: no such device here ({first_line(error)}); expected cpu or cuda[:N]"
        ) from None
    if "tf32" in precisions and device.type != "cuda":
        raise InputError(f"tf32 is a precision of CUDA devices, got --device {device}")
    return device
