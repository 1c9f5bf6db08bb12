"""The command line of ``python -m emanet_triton.predict``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from emanet_triton.command import Parser, below_one, count, program, share
from emanet_triton.data.overlay import ALPHA
from emanet_triton.inference.options import add_options, add_scale, check_int8
from emanet_triton.predict.outputs import KINDS

DEFAULT_MODEL = "emanet_r50-d8_512x1024_80k_cityscapes"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        InputError: an argument is not valid, or two arguments do not fit together.
    """
    parser = make_parser()
    args = parser.parse_intermixed_args(arguments)
    check_int8(parser, args, [args.precision])
    return args


def make_parser() -> Parser:
    """The parser of all arguments."""
    parser = Parser(
        prog=program("predict"),
        description="Segment pictures, folders of pictures, videos and webcams.",
        epilog=f"models: {program('eval')} --list",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a picture (JPEG, PNG, WebP, BMP, TIFF), a folder of pictures, a pattern such as "
        "'photos/*.jpg', a video, the number of a webcam, or - for a list of paths on standard "
        "input",
    )
    what = parser.add_argument_group("model")
    what.add_argument(
        "--ckpt",
        metavar="PATH_OR_MODEL",
        default=DEFAULT_MODEL,
        help="a checkpoint file, or the name of a model, whose published file is downloaded once; "
        "default: %(default)s",
    )
    what.add_argument(
        "--model",
        help="the model that --ckpt belongs to; default: the one that a file of emanet-triton "
        "train names, or whose published file has the name or the hash of --ckpt",
    )
    what.add_argument(
        "--data",
        type=Path,
        metavar="FILE.toml",
        help="a file that describes a data set, for the names and colours of the classes; default: "
        "the classes of the model, or those on which --ckpt was trained",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="DIR",
        help="the folder for results; default: %(default)s",
    )
    output.add_argument(
        "--save",
        type=_kinds,
        default=("overlay",),
        metavar="KIND,...",
        help="overlay: the classes painted over the picture, with a legend; color: the colours of "
        "the classes; labels: the ids of the classes, as the evaluation saves them; "
        "probabilities: float16 [classes, height, width] in a .npz file; default: overlay",
    )
    output.add_argument(
        "--train-ids",
        action="store_true",
        help="save as labels the class indices that segment returns, instead of the data set's ids",
    )
    output.add_argument(
        "--alpha",
        type=share,
        default=ALPHA,
        metavar="A",
        help="opacity of the colours in overlays, 0 to 1; default: %(default)s",
    )
    output.add_argument(
        "--classes",
        type=_names,
        metavar="NAME,...",
        help="paint only these classes in overlays and colours; default: all",
    )
    output.add_argument(
        "--overwrite",
        action="store_true",
        help="write files again that exist; default: skip what an earlier run has finished",
    )

    how = parser.add_argument_group("how to segment")
    add_scale(how)
    add_options(how)

    video = parser.add_argument_group("videos and webcams")
    video.add_argument(
        "--smooth",
        type=below_one,
        metavar="W",
        help="average the probabilities over the frames so that the labels do not flicker: the "
        "average so far has the weight W, at least 0 and less than 1, such as 0.8; default: off",
    )
    video.add_argument(
        "--frames", type=count, metavar="N", help="stop after N frames; default: at the end"
    )
    return parser


def _kinds(text: str) -> tuple[str, ...]:
    kinds = _list(text)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise argparse.ArgumentTypeError(
            f"'{unknown[0]}' is no kind of result; expected some of: {', '.join(KINDS)}"
        )
    return tuple(kind for kind in KINDS if kind in kinds)


def _names(text: str) -> tuple[str, ...]:
    return tuple(_list(text))


def _list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("expected names with commas between them, got none")
    return names
