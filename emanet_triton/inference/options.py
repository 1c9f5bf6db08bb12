"""The options of every command that runs a network on images."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from emanet_triton.command import RANK_THREADS, Parser, count, size, thread_count
from emanet_triton.cores import usable_cores
from emanet_triton.errors import InputError
from emanet_triton.inference.build import INT8, PRECISIONS
from emanet_triton.inference.calibration import CALIBRATION_IMAGES
from emanet_triton.models.protocol import MMSEG_VERSIONS, Protocol

_PROTOCOL, _NATIVE = "protocol", "native"  # sizes of the network's input that --scale names


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options that say how images go through the network, and by how many threads."""
    group.add_argument(
        "--ms-flip",
        action="store_true",
        help="average over the scales of the model's protocol, each also mirrored",
    )
    group.add_argument(
        "--protocol",
        choices=MMSEG_VERSIONS,
        help="mmsegmentation's version, for the sizes of --ms-flip; default: that of the model's "
        "protocol",
    )
    group.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    group.add_argument(
        "--precision",
        choices=(*PRECISIONS, INT8),
        default="fp32",
        help=f"default: fp32; {INT8} needs a CPU with AMX or AVX512-BF16",
    )
    group.add_argument(
        "--calibration",
        metavar="PICTURES",
        help=f"the pictures from which {INT8} takes the ranges of its activations: a folder, a "
        f"picture, or a pattern such as 'photos/*.jpg'; {CALIBRATION_IMAGES} of them are taken, "
        f"evenly spread; default: {CALIBRATION_IMAGES} images of this run",
    )
    group.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the fused network; on a GPU only if it passes its checks, which take some "
        "minutes in the first run; tf32 always runs the plain network",
    )
    group.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, replay the network as a CUDA graph for each input size that is repeated",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help="images of one size, or windows, that go through the network at once; default: one "
        "image and, on a GPU, all its windows",
    )
    group.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help=RANK_THREADS,
    )
    group.add_argument(
        "--workers",
        type=thread_count,
        default=min(8, usable_cores()),
        metavar="N",
        help="threads that read images and write pictures; default: %(default)s",
    )


def check_int8(parser: Parser, args: argparse.Namespace, precisions: Sequence[str | None]) -> None:
    """Refuse options of ``add_options`` that do not fit the precisions that will run.

    Raises:
        InputError: the plain network is wanted in int8, or images for ranges without int8.
    """
    if INT8 in precisions and not args.fuse:
        parser.error(f"{INT8} has no plain network: leave out --no-fuse")
    if args.calibration is not None and INT8 not in precisions:
        parser.error(f"--calibration names pictures for {INT8}, but no network runs in {INT8}")


def with_version(protocol: Protocol, wanted: str | None) -> Protocol:
    """The protocol with the version that ``--protocol`` names.

    Args:
        protocol: of the model.
        wanted: one of ``MMSEG_VERSIONS``, or ``None``: the model's own.

    Raises:
        InputError: the protocol is another project's.
    """
    if wanted is None:
        return protocol
    if protocol.version not in MMSEG_VERSIONS:
        raise InputError(
            f"--protocol {wanted}: the model's protocol is {protocol.version}'s, and not "
            "mmsegmentation's; expected no --protocol"
        )
    return replace(protocol, version=wanted)  # type: ignore[arg-type]  # one of the literals


def add_scale(group: argparse._ArgumentGroup) -> None:
    """Add the option ``--scale``, whose value ``scaled`` takes."""
    group.add_argument(
        "--scale",
        type=_scale,
        default=_PROTOCOL,
        metavar="SCALE",
        help="size of the network's input: protocol (the evaluation's size), native (the "
        "picture's own), or WIDTHxHEIGHT, into which the picture is fitted; default: %(default)s",
    )


def scaled(protocol: Protocol, scale: str | tuple[int, int], ms_flip: bool = False) -> Protocol:
    """The protocol with the size of the network's input that ``--scale`` names.

    Args:
        protocol: of the model, with the version that ``--protocol`` names.
        scale: a value of ``--scale``.
        ms_flip: whether all scales of the protocol will run.

    Raises:
        InputError: ``scale`` is a size, but the protocol's scales multiply the image's own.
    """
    if scale == _PROTOCOL:
        return protocol
    if ms_flip and protocol.version == "mmseg-1.x" and not isinstance(scale, str):
        raise InputError(
            f"--scale {scale[0]}x{scale[1]}: has no effect with --ms-flip, whose scales multiply "
            "the image's own size in mmsegmentation 1.x; expected no --scale, or --protocol "
            "mmseg-0.x"
        )
    return replace(protocol, base_scale=None if isinstance(scale, str) else scale)


def _scale(text: str) -> str | tuple[int, int]:
    """``"protocol"``, ``"native"``, or (width, height)."""
    if text in (_PROTOCOL, _NATIVE):
        return text
    return size(text, "protocol, native or WIDTHxHEIGHT such as 1024x512")
