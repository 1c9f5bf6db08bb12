"""The command line of ``python -m emanet_triton.eval``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from emanet_triton.command import Parser, count, program
from emanet_triton.data.public import DATASETS
from emanet_triton.inference.build import INT8, PRECISIONS
from emanet_triton.inference.options import add_options, check_int8
from emanet_triton.models.entries import PACKAGE, SOURCES, ZOO
from emanet_triton.models.zoo import datasets_of

PROJECTS = tuple(source for source in SOURCES if source != PACKAGE)  # that --all takes


def make_parser() -> Parser:
    """The parser of all options; ``parse`` also checks what fits together."""
    datasets = ", ".join(dict.fromkeys(entry.dataset.name for entry in ZOO.values()))
    parser = Parser(
        prog=program("eval"),
        description=f"Evaluate EMANet checkpoints on {datasets}, or a data set of your own. "
        "Without arguments: evaluate a small model that comes with this package, on generated "
        "street scenes.",
        epilog=f"models: {program('eval')} --list",
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print a table of all models, or of those of --all and --dataset, and end",
    )
    what = parser.add_argument_group("what to evaluate")
    what.add_argument(
        "--ckpt",
        metavar="PATH_OR_MODEL",
        help="a checkpoint file, or the name of a model, whose published file is downloaded once; "
        "with --all a folder that contains the published files",
    )
    what.add_argument(
        "--model",
        help="the model that --ckpt belongs to; default: the one that a file of emanet-triton "
        "train names, or whose published file has the name or the hash of --ckpt",
    )
    what.add_argument(
        "--all",
        nargs="?",
        const="mmseg",
        choices=PROJECTS,
        metavar="SOURCE",
        help="evaluate all models of a project on one data set, with one view and with ms+flip, in "
        f"one table: {', '.join(PROJECTS)}; default: %(const)s",
    )
    what.add_argument(
        "--dataset",
        choices=DATASETS,
        help="the data set in the folder --data, if it is not the model's own; with --all also "
        "which models of the project",
    )
    what.add_argument(
        "--data",
        type=Path,
        metavar="ROOT_OR_TOML",
        help=f"root folder of the model's data set ({datasets}), or a file .toml that describes "
        "another data set",
    )
    what.add_argument("--split", default="val", help="default: %(default)s")
    what.add_argument("--limit", type=count, metavar="N", help="evaluate only the first N images")

    how = parser.add_argument_group("how to evaluate")
    add_options(how)
    how.add_argument(
        "--compare",
        choices=(*PRECISIONS, INT8),
        metavar="PRECISION",
        help="also run the network in this precision on the same images; print the difference of "
        "the mIoU and the percentage of equal labels",
    )
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the network through torch.compile; on a CPU this makes the fused network no "
        "faster",
    )
    how.add_argument("--resume", action="store_true", help="continue an interrupted run")

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="OUT", help="write all figures to a file")
    output.add_argument(
        "--save-predictions",
        type=Path,
        metavar="DIR",
        help="write the predictions as PNG, with the ids and names of the benchmark server",
    )
    output.add_argument(
        "--save-overlays",
        type=Path,
        metavar="DIR",
        help="write image, prediction, label and error side by side as PNG",
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        InputError: an argument is not valid, or two arguments do not fit together.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.all and (args.model or args.ms_flip):
        parser.error(
            "--all evaluates every published model both ways: leave out --model and --ms-flip"
        )
    if args.all and (args.save_predictions or args.save_overlays):
        parser.error("--all writes no pictures: use --ckpt for one model at a time")
    if args.compare == args.precision:
        parser.error(f"--compare {args.compare}: --precision is the same")
    check_int8(parser, args, (args.precision, args.compare))
    if args.all and args.dataset and args.dataset not in (own := datasets_of(args.all)):
        parser.error(
            f"--all {args.all}: has no model of {args.dataset}; expected {' or '.join(own)}"
        )
    if args.dataset and not (args.all or args.list or args.ckpt):
        parser.error("--dataset names the data set of a model: give --ckpt or --all too")
    if args.model and not args.ckpt:
        parser.error("--model names the model of the file --ckpt: give --ckpt too")
    return args
