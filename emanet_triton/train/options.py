"""The command line of ``python -m emanet_triton.train``."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from emanet_triton.command import (
    RANK_THREADS,
    Parser,
    below_one,
    count,
    number,
    program,
    share,
    size,
    thread_count,
    whole,
)
from emanet_triton.cores import usable_cores
from emanet_triton.models.zoo import models_like
from emanet_triton.train.recipe import OPTIMIZERS, PRECISIONS, Recipe

NONE, NATIVE = "none", "native"
_MOST = 1e30  # of a number; PyTorch refuses some that float32 cannot express


def make_parser() -> Parser:
    """The parser of all options; ``parse`` also checks what fits together."""
    parser = Parser(
        prog=program("train"),
        description="Train an EMANet, by default with mmsegmentation's published schedule. Under "
        "torchrun the ranks share the images of each iteration.",
        epilog=f"models: {program('eval')} --list",
    )
    _add_what(parser.add_argument_group("what to train"))
    _add_schedule(parser.add_argument_group("schedule"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_how(parser.add_argument_group("how to run"))
    _add_output(parser.add_argument_group("output"))
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        InputError: an argument is not valid, or two arguments do not fit together.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.init and args.backbone:
        parser.error("--init gives all weights, --backbone some of them: give one of the two")
    if not (args.init or args.backbone or args.resume):
        parser.error(
            "expected --init with a checkpoint or the name of a model, --backbone with a file of "
            f"ResNet weights, or --init {NONE} for random weights"
        )
    if not args.model and args.init in (None, NONE):
        parser.error(f"--model is missing; expected {models_like()}")
    return args


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="ROOT_OR_TOML",
        help="root folder of the model's data set, or a .toml file that describes a data set",
    )
    group.add_argument(
        "--train-split", default="train", metavar="SPLIT", help="default: %(default)s"
    )
    group.add_argument(
        "--val-split",
        default="val",
        metavar="SPLIT",
        help="default: %(default)s; none: no validation",
    )
    group.add_argument("--model", help="the network; default: the model of --init")
    group.add_argument(
        "--init",
        metavar="PATH_OR_MODEL",
        help="initial weights: a checkpoint file, or the name of a model, whose published file is "
        "downloaded once; the classifiers are new if its number of classes differs; "
        f"{NONE}: random weights",
    )
    group.add_argument(
        "--backbone",
        type=Path,
        metavar="FILE",
        help="initial weights of the backbone only, such as resnet50_v1c of OpenMMLab",
    )


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    _add(group, "--iterations", count, Recipe.iterations, "N", "of the optimizer")
    _add(
        group,
        "--batch-size",
        count,
        Recipe.batch_size,
        "N",
        "images of an iteration, on all ranks together",
    )
    _add(
        group,
        "--accumulate",
        count,
        Recipe.accumulate,
        "N",
        "parts into which a rank splits its images, so that they take less memory",
    )
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=Recipe.optimizer, help="default: %(default)s"
    )
    _add(group, "--lr", positive, Recipe.lr, "LR", "highest learning rate")
    _add(group, "--min-lr", not_negative, Recipe.min_lr, "LR", "last learning rate")
    _add(group, "--power", not_negative, Recipe.power, "P", "of the fall of the learning rate")
    _add(
        group, "--warmup", whole, Recipe.warmup, "N", "iterations in which the learning rate rises"
    )
    _add(group, "--momentum", below_one, Recipe.momentum, "M", "of sgd")
    _add(group, "--weight-decay", not_negative, Recipe.weight_decay, "W", "of all parameters")
    _add(
        group,
        "--auxiliary-weight",
        not_negative,
        Recipe.auxiliary_weight,
        "W",
        "of the auxiliary head's loss",
    )
    _add(group, "--dropout", share, Recipe.dropout, "P", "before both classifiers")
    _add(
        group,
        "--class-balance",
        not_negative,
        Recipe.class_balance,
        "P",
        "weight a class by its share of the pixels to the power -P",
    )
    group.add_argument(
        "--ema",
        type=below_one,
        metavar="DECAY",
        help="average the weights over the iterations, and "
        "validate and save the averages; DECAY such as 0.999; default: off",
    )


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--crop", type=size, metavar="HEIGHTxWIDTH", help="default: that of the model"
    )
    group.add_argument(
        "--scale",
        type=scale,
        metavar="WIDTHxHEIGHT",
        help="images are fitted into this size "
        f"before the random ratio, and for the validation; {NATIVE}: images keep their size; "
        "default: that of the model's protocol",
    )
    group.add_argument(
        "--ratios",
        type=ratios,
        default=(0.5, 2.0),
        metavar="LOW,HIGH",
        help="of the random resize; default: 0.5,2",
    )
    _add(
        group,
        "--most-of-one-class",
        share,
        0.75,
        "S",
        "draw a crop again while one class covers this share of it or more; 1: never",
    )
    _add(group, "--flip", share, 0.5, "P", "how often a crop is mirrored")
    group.add_argument(
        "--colors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="change brightness, contrast, saturation and hue at random",
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=Recipe.precision,
        help="bf16 and fp16 by autocast; default: %(default)s",
    )
    group.add_argument(
        "--sync-bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the statistics of batch norms from the images of all ranks",
    )
    group.add_argument(
        "--compile", action="store_true", help="run the network through torch.compile"
    )
    group.add_argument(
        "--checkpointing",
        action="store_true",
        help="keep less of the backbone for the backward pass, and compute it twice",
    )
    group.add_argument(
        "--workers",
        type=whole,
        default=min(8, usable_cores()),
        metavar="N",
        help="processes of a rank that make training samples, and threads that read images for "
        "the validation; default: %(default)s",
    )
    group.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help=RANK_THREADS,
    )
    _add(group, "--seed", whole, Recipe.seed, "N", "of everything that is random")
    group.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read all files before the training begins",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder for all results"
    )
    group.add_argument("--resume", action="store_true", help="go on with the training in --out")
    _add(group, "--val-every", count, 8000, "N", "iterations from a validation to the next")
    _add(
        group,
        "--save-every",
        count,
        1000,
        "N",
        "iterations after which the training can be resumed",
    )
    _add(
        group,
        "--keep-every",
        count,
        8000,
        "N",
        "iterations from a checkpoint that is kept to the next",
    )
    _add(group, "--log-every", count, 50, "N", "iterations from a line to the next")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write losses, scores and pictures for TensorBoard",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="only draw eight training samples as one picture, "
        "and measure the memory of one iteration",
    )


def _add(
    group: argparse._ArgumentGroup,
    name: str,
    kind: Callable[[str], float],
    default: float,
    metavar: str,
    text: str,
) -> None:
    group.add_argument(
        name, type=kind, default=default, metavar=metavar, help=f"{text}; default: %(default)s"
    )


def positive(text: str) -> float:
    return number(text, f"a number above 0 and at most {_MOST:g}", lambda value: 0 < value <= _MOST)


def not_negative(text: str) -> float:
    return number(text, f"a number of 0 to {_MOST:g}", lambda value: 0 <= value <= _MOST)


def ratios(text: str) -> tuple[float, float]:
    """(lowest, highest)."""
    low, _, high = text.partition(",")
    pair = positive(low), positive(high or low)
    if pair[0] > pair[1]:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH with LOW at most HIGH, got '{text}'")
    return pair


def scale(text: str) -> tuple[int, int] | str:
    """(width, height), or ``NATIVE``."""
    return NATIVE if text == NATIVE else size(text)
