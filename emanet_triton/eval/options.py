"""The command line of ``python -m emanet_triton.eval``."""

import argparse
from pathlib import Path

from emanet_triton.command import Parser
from emanet_triton.cores import usable_cores
from emanet_triton.models.protocol import VERSIONS
from emanet_triton.models.zoo import list_models

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_MOST_THREADS = 1024  # a process that starts tens of thousands is killed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        InputError: they are not as they should be, or do not fit together.
    """
    parser = Parser(
        prog="python -m emanet_triton.eval",
        description="Evaluate EMANet checkpoints on Cityscapes. Without arguments: a small model "
        "that comes with this package, on generated street scenes.",
        epilog=f"models: {', '.join(list_models())}",
    )
    what = parser.add_argument_group("what to evaluate")
    what.add_argument(
        "--ckpt",
        metavar="PATH_OR_MODEL",
        help="checkpoint file, or a model's name for its published file (downloaded once); "
        "with --all a folder of the four published files",
    )
    what.add_argument(
        "--model",
        help="architecture and protocol of --ckpt; by default told by the published file's name "
        "or hash",
    )
    what.add_argument(
        "--all",
        action="store_true",
        help="the four published models, single view and ms+flip, in one table",
    )
    what.add_argument("--data", type=Path, metavar="CITYSCAPES_ROOT")
    what.add_argument("--split", default="val", help="default: %(default)s")
    what.add_argument("--limit", type=_count, metavar="N", help="only the first N images")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--ms-flip", action="store_true", help="average over six scales, each also mirrored"
    )
    how.add_argument(
        "--protocol",
        choices=VERSIONS,
        default=VERSIONS[0],
        help="whose multi-scale sizes to use; default: %(default)s",
    )
    how.add_argument("--device", help="default: cuda where there is one, else cpu")
    how.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    how.add_argument(
        "--compare",
        choices=PRECISIONS,
        metavar="PRECISION",
        help="run the network in this precision, too, on the same images, and tell how many labels "
        "agree and how far apart the figures are",
    )
    how.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the fused inference network; on a GPU only if it agrees with the plain "
        "network; tf32 runs the plain network",
    )
    how.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the network through torch.compile; not by default, since on a CPU it makes the "
        "fused network no faster",
    )
    how.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, replay the network as a CUDA graph for every input size that comes again",
    )
    how.add_argument(
        "--batch-size",
        type=_count,
        metavar="N",
        help="images or windows that go through the network at once; default: one image, of its "
        "windows all on a GPU, one on a CPU",
    )
    how.add_argument(
        "--threads",
        type=_thread_count,
        metavar="N",
        help="threads of the network on a CPU; default: the cores this process may use, shared "
        "with the other processes of a torchrun",
    )
    how.add_argument(
        "--workers",
        type=_thread_count,
        default=min(8, usable_cores()),
        metavar="N",
        help="threads that decode images and write pictures; default: %(default)s",
    )
    how.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="OUT", help="write all figures to a file")
    output.add_argument(
        "--save-predictions",
        type=Path,
        metavar="DIR",
        help="label ids as PNG, under the benchmark server's names",
    )
    output.add_argument(
        "--save-overlays",
        type=Path,
        metavar="DIR",
        help="image, prediction, label and error side by side as PNG",
    )

    args = parser.parse_args(arguments)
    if args.all and (args.model or args.ms_flip):
        parser.error(
            "--all evaluates every published model both ways: leave out --model, --ms-flip"
        )
    if args.all and (args.save_predictions or args.save_overlays):
        parser.error("--all writes no pictures: use --ckpt for one model at a time")
    if args.compare == args.precision:
        parser.error(f"--compare {args.compare}: --precision is the same")
    if args.model and not args.ckpt:
        parser.error("--model says what the file of --ckpt is: give --ckpt too")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _thread_count(text: str) -> int:
    count = _count(text)
    if count > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_THREADS} threads, got {count}")
    return count
