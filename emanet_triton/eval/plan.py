"""From the command line to evaluations: everything is checked before the first one starts."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emanet_triton.cores import default_threads
from emanet_triton.data.dataset import Dataset, Sample, problems_error
from emanet_triton.data.description import is_description, open_dataset
from emanet_triton.data.public import DATASETS, in_folder
from emanet_triton.data.scenes.generate import demo_dataset
from emanet_triton.errors import InputError
from emanet_triton.eval.outputs import Outputs, keep_out, refuse_overwriting
from emanet_triton.eval.partial import PartialResult, Stamp, software, stamp, stamps
from emanet_triton.eval.ranks import Ranks
from emanet_triton.eval.runner import check_samples
from emanet_triton.files import exists, is_folder, require_writable
from emanet_triton.inference.build import (
    INT8,
    load_network,
    open_device,
    ready_network,
    require_compiler,
)
from emanet_triton.inference.calibration import Calibration, evenly_spread, named_calibration
from emanet_triton.inference.options import with_version
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.checkpoint import Checkpoint
from emanet_triton.models.chosen import Chosen, choose, chosen_path, read_chosen
from emanet_triton.models.entries import DEMO
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import (
    ZOO,
    datasets_of,
    list_models,
    models_like,
    name_of,
    published_path,
    read_published,
)


@dataclass(frozen=True)
class Job:
    """One evaluation: a checkpoint under a protocol, with or without ms+flip.

    Attributes:
        name: of the model in the zoo.
        checkpoint: its weights.
        protocol: how images are resized and cut into windows.
        ms_flip: average over scales and mirroring.
        reconstruct: False leaves out the EM attention's reconstruction.
        num_classes: channels of the logits; ``None``: the classes of the model's own data set.
    """

    name: str
    checkpoint: Checkpoint
    protocol: Protocol
    ms_flip: bool
    reconstruct: bool = True
    num_classes: int | None = None

    def load(self, device: torch.device) -> Network:
        """Build the plain network on its device.

        Raises:
            InputError: the weights do not fit.
        """
        model = load_network(self.name, self.checkpoint, device, num_classes=self.num_classes)
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
        calibration: the images from which int8 takes its ranges; ``None`` if no network is int8.
        fuse: run the fused network.
        compile: run the network through ``torch.compile``.
        cuda_graphs: replay the network as a CUDA graph on a GPU.
        batch_size: images or windows at once, or ``None`` for the default of the device.
        resume: go on where an interrupted run stopped.
        outputs: folders for pictures.
        json: the file that gets all figures, or ``None``.
        all: whether the jobs are all models of a project, and ``json`` gets a list.
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
    calibration: Calibration | None
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
        """Load the network of a job.

        An ablation and tf32 run the plain network, for bf16 and fp16 under autocast. An ablation
        has no int8 form, so with int8 there is no such job.
        """
        if job.reconstruct:
            network = ready_network(
                job.name,
                job.checkpoint,
                self.device,
                precision,
                fuse=self.fuse,
                images=len(self.samples),
                num_classes=job.num_classes,
                protocol=job.protocol,
                calibration=self.calibration,
            )
        else:
            network = job.load(self.device)
            job.checkpoint.release()
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
        protocol = job.protocol
        if not job.ms_flip:  # the version says only how ms+flip computes sizes
            protocol = replace(protocol, version=entry.protocol.version)
        same = (
            name_of(job.checkpoint) == job.name
            and self.dataset is entry.dataset
            and (self.split, len(self.samples)) == self.dataset.published_on
            and protocol == entry.protocol
            and job.reconstruct
        )
        return published_figure(job) if same else None

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
            "dataset": self.dataset.description or self.dataset.name,
            "split": self.split,
            "samples": [sample.name for sample in self.samples],
            "precision": self.precision,
            "compare": self.compare,
            "calibration": [
                [str(path.resolve()), stamp(path)]
                for path in (self.calibration.paths if self.calibration else ())
            ],
            "fuse": self.fuse,
            "compile": self.compile,
            "device": self.device.type,
            "outputs": [folder and str(folder.resolve()) for folder in folders],
        }


def published_figure(job: Job) -> float | None:
    """The published mIoU in percent of a job's model and views, if there is one."""
    published = ZOO[job.name].published
    if published is None:
        return None
    return published.miou_ms_flip if job.ms_flip else published.miou


def make_plan(args: Namespace, ranks: Ranks) -> Plan:
    """Find and check everything that the options name: first the data, then the checkpoints.

    Args:
        args: the options, as ``options.parse`` returns them.
        ranks: the processes that share the evaluation.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    device = open_device(args.device, (args.precision, args.compare), ranks.local_rank)
    if args.compile:
        require_compiler(device)
    chosen = _chosen(args)
    dataset = chosen[0].dataset
    data = chosen[0].root
    demo = data is None and chosen[0].name == DEMO and dataset is ZOO[DEMO].dataset
    if data is None:
        if not demo:
            raise InputError(f"--data is missing; expected the root of {dataset.name}")
        data = demo_dataset()
    outputs = Outputs(dataset, args.save_predictions, args.save_overlays)
    keep_out(dataset, data, outputs.folders() | {"--json": args.json})
    samples, problems = dataset.find(data, args.split, args.limit)
    outputs.prepare()
    if args.json:
        require_writable(args.json)
    inputs = [_checkpoint_path(args, each.name) for each in chosen]
    inputs += [args.data] if args.data and is_description(args.data) else []
    calibration = _calibration(args, dataset, samples)
    inputs += calibration.paths if calibration else ()
    refuse_overwriting(outputs, args.json, samples, inputs)
    stamped = stamps(samples)
    check_samples(samples, dataset, problems, ranks, args.workers)
    return Plan(
        jobs=_jobs(args, chosen),
        dataset=dataset,
        data=data,
        split=args.split,
        samples=samples,
        stamps=stamped,
        device=device,
        threads=args.threads or default_threads(ranks.local_count),
        workers=args.workers,
        precision=args.precision,
        compare=args.compare,
        calibration=calibration,
        fuse=args.fuse,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        batch_size=args.batch_size,
        resume=args.resume,
        outputs=outputs,
        json=args.json,
        all=args.all is not None,
        demo=demo,
    )


def _chosen(args: Namespace) -> list[Chosen]:
    """The models to evaluate, all on the same data set."""
    if args.all:
        return _all_of(args.all, args.dataset, args.data)
    if args.ckpt:
        return [choose(args.ckpt, args.model, args.data, args.dataset)]
    if args.data is None:
        return [choose(DEMO)]
    raise InputError(f"--ckpt is missing; expected a checkpoint file or {models_like()}")


def _all_of(source: str, wanted: str | None, data: Path | None) -> list[Chosen]:
    """The models of a project that share a data set.

    Raises:
        InputError: it is not clear which data set is meant.
    """
    key = _shared_set(source, wanted, data)
    default = DATASETS[key]
    dataset, root = open_dataset(data, default) if data else (default, None)
    names = list_models(source=source, dataset=key)
    return [Chosen(name, dataset, ZOO[name].protocol, root) for name in names]


def _shared_set(source: str, wanted: str | None, data: Path | None) -> str:
    """The name of the data set: the wanted one, the project's only one, or that of the folder."""
    own = datasets_of(source)
    if wanted is not None or len(own) == 1:
        return wanted or own[0]
    expected = f"expected the root of one of {', '.join(own)}, or --dataset with its name"
    if data is None:
        raise InputError(f"--all {source}: --data is missing; {expected}")
    if is_description(data):
        raise InputError(
            f"--all {source}: --data {data} does not say which models are meant; expected "
            f"--dataset with one of {', '.join(own)}"
        )
    if not is_folder(data):
        raise InputError(f"--data {data}: there is no such folder; {expected}")
    found = list(in_folder(data))
    fitting = [key for key in found if key in own]
    if len(fitting) != 1:
        has = " and ".join(found) or "no data set"
        raise InputError(f"--data {data}: has the folders of {has}; {expected}")
    return fitting[0]


def _calibration(
    args: Namespace, dataset: Dataset, samples: Sequence[Sample]
) -> Calibration | None:
    """The images for int8. The samples are those of all ranks, so all ranks choose the same."""
    if INT8 not in (args.precision, args.compare):
        return None
    if args.calibration is not None:
        return named_calibration(args.calibration)
    paths = tuple(sample.image for sample in evenly_spread(samples))
    return Calibration(paths, f"split {args.split}", dataset.read_image)


def _jobs(args: Namespace, chosen: Sequence[Chosen]) -> list[Job]:
    """Read the checkpoints, which may download them, and check that their weights fit."""
    _require_files(args, chosen)
    checkpoints = [(each, _read(args, each.name)) for each in chosen]
    demo = args.ckpt is None and not args.all
    ablation = demo and INT8 not in (args.precision, args.compare)  # which has no int8 form
    jobs = [
        Job(
            each.name,
            checkpoint,
            with_version(each.protocol, args.protocol),
            ms,
            reconstruct,
            each.num_classes,
        )
        for ms in ((False, True) if args.all else (args.ms_flip,))
        for reconstruct in ((True, False) if ablation else (True,))
        for each, checkpoint in checkpoints
    ]
    for job in jobs[: len(chosen)]:
        job.load(torch.device("meta"))
        if args.all:  # so many networks at once would take gigabytes
            job.checkpoint.release()
    return jobs


def _require_files(args: Namespace, chosen: Sequence[Chosen]) -> None:
    """Name all files of ``--all --ckpt FOLDER`` that are missing, before one is read."""
    paths = [published_path(each.name, args.ckpt) for each in chosen] if args.all else []
    missing = [f"{path}: no such file" for path in paths if args.ckpt and not exists(path)]
    if missing:
        raise problems_error(f"--ckpt {args.ckpt}: expected the published files:", missing)


def _read(args: Namespace, name: str) -> Checkpoint:
    if args.all:
        return read_published(name, args.ckpt)
    return read_chosen(args.ckpt, name)


def _checkpoint_path(args: Namespace, name: str) -> Path:
    """The file that ``_read`` reads."""
    if args.all:
        return published_path(name, args.ckpt)
    return chosen_path(args.ckpt, name)
