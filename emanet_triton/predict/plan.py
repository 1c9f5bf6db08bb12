"""From the command line to a predictor and its sources: everything is checked first."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emanet_triton.cores import default_threads
from emanet_triton.data.description import SUFFIX, is_description
from emanet_triton.data.overlay import class_names
from emanet_triton.errors import InputError
from emanet_triton.files import require_folder
from emanet_triton.inference.build import INT8, open_device, ready_network
from emanet_triton.inference.calibration import (
    Calibration,
    named_calibration,
    readable_calibration,
)
from emanet_triton.inference.options import scaled, with_version
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.chosen import Chosen, choose, read_chosen
from emanet_triton.models.protocol import Protocol
from emanet_triton.predict.outputs import Outputs, check_places
from emanet_triton.predict.sources import Source, find_sources


@dataclass(frozen=True)
class Plan:
    """All that a command line asks for, found and checked.

    Attributes:
        pictures: to segment.
        videos: to segment.
        skipped: the number of sources whose results exist already.
        notes: lines for the user.
        outputs: what is saved, and where.
        predictor: the network with its protocol; ``None`` if nothing is left to segment.
        workers: threads that read pictures and write results.
        smooth: weight of the frames before, or ``None``.
        frames: the most frames of a video, or ``None``.
    """

    pictures: list[Source]
    videos: list[Source]
    skipped: int
    notes: list[str]
    outputs: Outputs
    predictor: Predictor | None
    workers: int
    smooth: float | None
    frames: int | None


def make_plan(args: Namespace) -> Plan:
    """Find and check everything that the options name: first the sources, then the checkpoint.

    Raises:
        InputError: something is missing, damaged or does not fit.
    """
    device = open_device(args.device, [args.precision])
    sources = find_sources(args.sources, args.out)
    calibration = _calibration(args, sources.found)
    if args.data and not is_description(args.data):
        raise InputError(f"--data {args.data}: expected a file *{SUFFIX} that describes a data set")
    chosen = choose(args.ckpt, args.model, args.data)
    protocol = with_version(chosen.protocol, args.protocol)
    protocol = scaled(protocol, args.scale, args.ms_flip)
    outputs = Outputs(
        folder=args.out,
        kinds=args.save,
        dataset=chosen.dataset,
        train_ids=args.train_ids,
        alpha=args.alpha,
        classes=_classes(args, chosen),
        overwrite=args.overwrite,
    )
    check_places(outputs, sources.found, sources.folders)
    require_folder(args.out)
    _keep_recordings(outputs, sources.found)
    left = [source for source in sources.found if outputs.missing(source)]
    pictures = [source for source in left if not source.is_video]
    if left and calibration:
        sources.notes.append(f"{INT8}: {calibration}")
    torch.set_num_threads(args.threads or default_threads())
    return Plan(
        pictures=pictures,
        videos=[source for source in left if source.is_video],
        skipped=len(sources.found) - len(left),
        notes=sources.notes,
        outputs=outputs,
        predictor=_predictor(args, chosen, protocol, device, left, calibration) if left else None,
        workers=args.workers,
        smooth=args.smooth,
        frames=args.frames,
    )


def _predictor(
    args: Namespace,
    chosen: Chosen,
    protocol: Protocol,
    device: torch.device,
    left: Sequence[Source],
    calibration: Calibration | None,
) -> Predictor:
    images = None if any(source.is_video for source in left) else len(left)
    network = ready_network(
        chosen.name,
        read_chosen(args.ckpt, chosen.name),
        device,
        args.precision,
        fuse=args.fuse,
        images=images,
        num_classes=chosen.num_classes,
        protocol=protocol,
        calibration=calibration,
    )
    return Predictor(
        network,
        protocol,
        ms_flip=args.ms_flip,
        precision=args.precision,
        batch_size=args.batch_size,
        cuda_graphs=args.cuda_graphs,
    )


def _calibration(args: Namespace, sources: Sequence[Source]) -> Calibration | None:
    """The pictures for int8: by default of all sources, finished or not.

    So a command that is repeated has the same ranges.
    """
    if args.precision != INT8:
        return None
    if args.calibration is not None:
        return named_calibration(args.calibration)
    paths = [s.path for s in sources if isinstance(s.path, Path) and not s.is_video]
    if not paths:
        raise InputError(
            f"{INT8} takes its ranges from pictures, got none among the sources; expected "
            "--calibration PICTURES"
        )
    return readable_calibration(paths, "this run")


def _keep_recordings(outputs: Outputs, sources: Sequence[Source]) -> None:
    """Refuse to record a webcam where a recording lies."""
    for webcam in (source for source in sources if isinstance(source.path, int)):
        missing = outputs.missing(webcam).values()
        for path in outputs.paths(webcam):
            if path not in missing:
                raise InputError(
                    f"{path}: exists already; expected --overwrite or another --out for a new "
                    f"recording of {webcam}"
                )


def _classes(args: Namespace, chosen: Chosen) -> tuple[str, ...] | None:
    known = class_names(chosen.dataset)
    for name in args.classes or ():
        if name not in known:
            raise InputError(
                f"--classes: {chosen.dataset.name} has no class '{name}'; expected some of: "
                + ", ".join(known)
            )
    return args.classes
