"""From the command line to evaluations: everything is checked before the first one starts."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emanet_triton.cores import usable_cores
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Dataset, Sample
from emanet_triton.data.scenes.generate import demo_dataset
from emanet_triton.errors import InputError, first_line
from emanet_triton.eval.outputs import Outputs, keep_out, refuse_overwriting
from emanet_triton.eval.partial import PartialResult, Stamp, software, stamps
from emanet_triton.eval.ranks import Ranks
from emanet_triton.eval.runner import check_samples
from emanet_triton.files import require_writable
from emanet_triton.inference.predictor import HALF, Predictor
from emanet_triton.kernels.conv import choice
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.loading import load_into
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import (
    DEMO,
    ZOO,
    create_model,
    find_entry,
    list_models,
    name_of,
    published_path,
    read_published,
)

FEW_IMAGES = 20  # for fewer, no time is spent on measuring a CPU's convolutions


@dataclass(frozen=True)
class Job:
    """One evaluation: a checkpoint under a protocol, with or without ms+flip.

    Attributes:
        name: of the model in the zoo.
        checkpoint: its weights.
        protocol: how images are resized and cut into windows.
        ms_flip: average over scales and mirroring.
        reconstruct: False leaves out the EM attention's reconstruction.
    """

    name: str
    checkpoint: Checkpoint
    protocol: Protocol
    ms_flip: bool
    reconstruct: bool = True

    def load(self, device: torch.device, share: bool = False) -> Network:
        """Build the network on its device.

        Args:
            device: of the network.
            share: use the checkpoint's own memory and dtypes instead of a copy in float32.

        Raises:
            InputError: the weights do not fit.
        """
        model = create_model(self.name)
        load_into(model, self.checkpoint, share)
        model = model.to(device)
        if not self.reconstruct:
            # On the device: a CUDA graph could not copy it there.
            zero = torch.zeros(1, device=device)
            model.get_submodule("decode_head").fixed_reconstruction = zero
        return model


@dataclass(frozen=True)
class Plan:
    """All that a command line asks for, found and checked.

    Attributes:
        jobs: the evaluations, in order.
        dataset: the data set on which all jobs run.
        data: root of the data set.
        split: of the data set.
        samples: of the split, all or the first ones.
        stamps: of the samples' files before they were checked.
        device: the device of the network.
        threads: of PyTorch's operations on the CPU.
        workers: threads that decode images and write pictures.
        precision: of the network.
        compare: another precision to compare with, or ``None``.
        fuse: run the fused network.
        compile: run the network through ``torch.compile``.
        cuda_graphs: replay the network as a CUDA graph on a GPU.
        batch_size: images or windows at once, or ``None`` for the default of the device.
        resume: go on where an interrupted run stopped.
        outputs: folders for pictures.
        json: the file that gets all figures, or ``None``.
        all: whether the jobs are the published models, and ``json`` gets a list.
        demo: whether this is the demonstration.
    """

    jobs: list[Job]
    dataset: Dataset
    data: Path
    split: str
    samples: list[Sample]
    stamps: dict[str, Stamp]
    device: torch.device
    threads: int
    workers: int
    precision: str
    compare: str | None
    fuse: bool
    compile: bool
    cuda_graphs: bool
    batch_size: int | None
    resume: bool
    outputs: Outputs
    json: Path | None
    all: bool
    demo: bool

    def predictor(self, job: Job, precision: str) -> Predictor:
        """Load the network of a job; an ablation and tf32 run the plain network."""
        fused = self.fuse and job.reconstruct and precision != "tf32"
        model = network = job.load(self.device, share=fused and self.device.type == "cpu")
        job.checkpoint.release()
        if fused:
            few = self.device.type == "cpu" and len(self.samples) < FEW_IMAGES
            with choice.without_measuring() if few else contextlib.nullcontext():
                network = verified_fuse(model, HALF.get(precision, torch.float32))
            if network is model:
                model.float()  # its tensors may still be the checkpoint's
        return Predictor(
            network,
            job.protocol,
            ms_flip=job.ms_flip,
            precision=precision,
            batch_size=self.batch_size,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
        )

    def outputs_of(self, job: Job) -> Outputs:
        """The pictures that a job writes. An ablation writes none."""
        return self.outputs if job.reconstruct else Outputs(self.dataset)

    def partial(self, job: Job, rank: int) -> PartialResult:
        """The partial result of a job, for the images of one rank."""
        return PartialResult(
            self._settings(job),
            rank,
            matrices=3 if self.compare else 1,
            classes=len(self.dataset.classes),
            versions=software(self.device),
            stamps=self.stamps,
        )

    def published(self, job: Job) -> float | None:
        """The published mIoU in percent that a job should reproduce, if there is one."""
        entry = ZOO[job.name]
        same = (
            entry.sha256 is not None
            and job.checkpoint.sha256.startswith(entry.sha256)
            and (self.split, len(self.samples)) == self.dataset.published_on
            and job.reconstruct
        )
        if entry.published is None or not same:
            return None
        return entry.published.miou_ms_flip if job.ms_flip else entry.published.miou

    def _settings(self, job: Job) -> dict[str, Any]:
        """Everything that determines the result and the pictures of a job, as JSON values."""
        outputs = self.outputs_of(job)
        folders = (outputs.predictions, outputs.overlays)
        return {
            "model": job.name,
            "sha256": job.checkpoint.sha256,
            "protocol": asdict(job.protocol),
            "ms_flip": job.ms_flip,
            "reconstruct": job.reconstruct,
            "data": str(self.data.resolve()),
            "split": self.split,
            "samples": [sample.name for sample in self.samples],
            "precision": self.precision,
            "compare": self.compare,
            "fuse": self.fuse,
            "compile": self.compile,
            "device": self.device.type,
            "outputs": [folder and str(folder.resolve()) for folder in folders],
        }


def make_plan(args: Namespace, ranks: Ranks) -> Plan:
    """Find and check everything that the options name: first the data, then the checkpoints.

    Args:
        args: the options, as ``options.parse`` returns them.
        ranks: the processes that share the evaluation.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    device = _device(args.device, (args.precision, args.compare), ranks)
    names = _model_names(args)
    dataset = ZOO[names[0]].dataset
    demo = args.data is None and names == [DEMO]
    if args.data is None and not demo:
        raise InputError(f"--data is missing; expected the root of {dataset.name}")
    data = demo_dataset() if args.data is None else args.data
    outputs = Outputs(dataset, args.save_predictions, args.save_overlays)
    keep_out(dataset, data, outputs.folders() | {"--json": args.json})
    samples, problems = dataset.find(data, args.split, args.limit)
    outputs.prepare()
    if args.json:
        require_writable(args.json)
    checkpoints = [_checkpoint_path(args, name) for name in names]
    refuse_overwriting(outputs, args.json, samples, checkpoints)
    stamped = stamps(samples)
    check_samples(samples, dataset, problems, ranks, args.workers)
    return Plan(
        jobs=_jobs(args, names),
        dataset=dataset,
        data=data,
        split=args.split,
        samples=samples,
        stamps=stamped,
        device=device,
        threads=args.threads or max(1, usable_cores() // ranks.local_count),
        workers=args.workers,
        precision=args.precision,
        compare=args.compare,
        fuse=args.fuse,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        batch_size=args.batch_size,
        resume=args.resume,
        outputs=outputs,
        json=args.json,
        all=args.all,
        demo=demo,
    )


def _model_names(args: Namespace) -> list[str]:
    """The models to evaluate. A checkpoint is read only if nothing else names its model."""
    if args.all:
        entries = ((name, ZOO[name]) for name in list_models())
        return [name for name, e in entries if e.published and e.dataset is CITYSCAPES]
    if args.ckpt:
        return [_model_of(args.ckpt, args.model, args.data)]
    if args.data is None:
        return [DEMO]
    raise InputError(
        "--ckpt is missing; expected a checkpoint file or one of: " + ", ".join(list_models())
    )


def _model_of(ckpt: str, model: str | None, data: Path | None) -> str:
    """The model of the checkpoint that ``--ckpt`` names."""
    path = Path(ckpt)
    if model is not None:
        find_entry(model)
    if ckpt in ZOO and not path.exists():
        if model not in (None, ckpt):
            raise InputError(f"--ckpt {ckpt} is not a checkpoint of --model {model}")
        return ckpt
    if not path.exists() and path.suffix == "":
        raise InputError(
            f"{ckpt}: no such file and no such model; expected a checkpoint file or one of: "
            + ", ".join(list_models())
        )
    known = model or next((n for n, entry in ZOO.items() if entry.file == path.name), None)
    if path.exists():
        if known:
            return known
        if data and not os.path.isdir(data):  # noqa: PTH112 (unlike Path.is_dir, never raises)
            raise InputError(f"--data {data}: there is no such folder")
    name = name_of(read_checkpoint(path))  # the call raises if there is no file
    if name is None:
        raise InputError(
            f"{ckpt}: neither its name nor its hash belongs to a published file; expected --model "
            "with one of: " + ", ".join(list_models())
        )
    return name


def _jobs(args: Namespace, names: Sequence[str]) -> list[Job]:
    """Read the checkpoints, which may download them, and check that their weights fit."""
    checkpoints = {name: _read(args, name) for name in names}
    demo = args.ckpt is None and not args.all
    jobs = [
        Job(name, checkpoint, replace(ZOO[name].protocol, version=args.protocol), ms, reconstruct)
        for ms in ((False, True) if args.all else (args.ms_flip,))
        for reconstruct in ((True, False) if demo else (True,))
        for name, checkpoint in checkpoints.items()
    ]
    for job in jobs[: len(names)]:
        job.load(torch.device("meta"))
        if args.all:  # four networks at once would take a gigabyte
            job.checkpoint.release()
    return jobs


def _read(args: Namespace, name: str) -> Checkpoint:
    if _own_file(args):
        return read_checkpoint(args.ckpt)
    return read_published(name, args.ckpt if args.all else None)


def _checkpoint_path(args: Namespace, name: str) -> Path:
    """The file that ``_read`` reads."""
    if _own_file(args):
        return Path(args.ckpt)
    return published_path(name, args.ckpt if args.all else None)


def _own_file(args: Namespace) -> bool:
    """Whether ``--ckpt`` names a file, and not a model or a folder of published files."""
    return bool(args.ckpt) and not args.all and Path(args.ckpt).exists()


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
