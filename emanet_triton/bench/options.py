"""The command line of ``python -m emanet_triton.bench``."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from emanet_triton.bench.neighbour import PROGRAMS
from emanet_triton.bench.networks import NETWORKS
from emanet_triton.command import Parser, count, number, program, size, thread_count
from emanet_triton.errors import InputError
from emanet_triton.inference.views import Size
from emanet_triton.kernels.device import DTYPES

THREADS = "on the CPU; default: PyTorch's number, at most the cores that this process may use"
OUR_BACKENDS = {"ours-torch": "torch", "triton": "triton"}  # provider → backend of our operators
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """What to run. If a tuple is empty, the suite chooses for the device.

    Attributes:
        device: "cpu" or "cuda".
        quick: the short selection of a run without arguments.
        tiny: the smallest cases that still run everything, for tests and warm-up.
        sizes: (height, width) of images in pixels.
        batches: numbers of images in one call.
        dtypes: "fp32", "bf16", "fp16".
        networks: "r50", "r101".
        providers: their names.
        every: whether to take every provider if none is named, also those that run only by name.
        threads: PyTorch's threads on the CPU; 0 changes nothing.
    """

    device: str = "cpu"
    quick: bool = False
    tiny: bool = False
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    every: bool = False
    threads: int = 0

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def short(self) -> bool:
        """Whether to leave out what takes long to prepare, such as compiling."""
        return self.quick or self.tiny

    @property
    def ours(self) -> list[str]:
        """The providers that are our operators. The Triton kernels need a GPU."""
        return [name for name in OUR_BACKENDS if self.cuda or name != "triton"]

    def pick(
        self, providers: Mapping[str, T], baseline: str, leave_out: Iterable[str] = ()
    ) -> dict[str, T]:
        """The selected providers, always with the baseline, which is first.

        Args:
            providers: all providers of a case.
            baseline: one of them.
            leave_out: providers that run only if the user names them.
        """
        unasked = set(providers) - set(() if self.every else leave_out)
        wanted = set(self.providers or unasked) | {baseline}
        names = dict.fromkeys((baseline, *providers))
        return {name: providers[name] for name in names if name in wanted}


def run_parser(suites: Sequence[str]) -> Parser:
    """The parser of a run's options, and of the names of suites if there are any."""
    parser = Parser(
        prog=program("bench"),
        description="Time EMANet and its parts in turns with their competitors. Without arguments: "
        "a short selection of all suites, which takes minutes for each suite.",
        epilog="other commands: report [--check] makes docs/benchmarks.md from results; "
        "compare A.csv B.csv says what got faster or slower; gpu-check --stage run|profile|rows "
        "does all that needs a GPU",
    )
    if suites:
        names = f"{', '.join(suites)}; default: all, short"
        parser.add_argument("suites", nargs="*", metavar="SUITE", help=names)
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--providers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="ways to compute a case; the first of a case always runs. A wrong NAME lists them",
    )
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    what.add_argument("--threads", type=thread_count, default=0, metavar="N", help=THREADS)
    what.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=[],
        help="of the inputs, which the suites conv, em and post take; in model a provider's name "
        "says its dtype",
    )
    what.add_argument(
        "--sizes", nargs="+", type=size, default=[], metavar="HxW", help="of images, in pixels"
    )
    what.add_argument(
        "--batches",
        nargs="+",
        type=count,
        default=[],
        metavar="N",
        help="images in one call, which the suites conv, em and train-mem take",
    )
    what.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=[],
        help="which the suites conv, model and train-mem take",
    )
    what.add_argument(
        "--cases", nargs="+", default=[], metavar="TEXT", help="cases whose name contains a TEXT"
    )
    what.add_argument(
        "--tiny",
        action="store_true",
        help="only see that all runs: smallest cases; all suites take some minutes, about six on "
        "two cores",
    )

    how = parser.add_argument_group("how long")
    how.add_argument("--rounds", type=count, metavar="N", help="default: 15; in a short run 5")
    how.add_argument(
        "--seconds", type=positive, metavar="S", help="for the times of a case; default: 60, or 4"
    )
    how.add_argument(
        "--repeat-until",
        type=positive,
        metavar="REL",
        help="go on until the relative error of every median is at most REL, or the seconds end",
    )
    how.add_argument(
        "--silence",
        type=positive,
        default=900,
        metavar="S",
        help="on a GPU: end a provider after S seconds without a sign of life (default: 900)",
    )
    how.add_argument(
        "--neighbour",
        choices=PROGRAMS,
        help="measure beside a process that computes (spin) or copies (memory) all the time",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--csv", type=Path, metavar="FILE", help="the rows")
    output.add_argument("--plot", type=Path, metavar="DIR", help="charts (extra: plot)")
    return parser


def parse(arguments: Sequence[str], suites: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of a run.

    Raises:
        InputError: bad arguments.
    """
    options = run_parser(suites).parse_args(arguments)
    for suite in options.suites:
        if suite not in suites:
            raise InputError(f"unknown suite '{suite}'; expected one of: {', '.join(suites)}")
    return options


def positive(text: str) -> float:
    """A number above 0, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    return number(text, "a number above 0", lambda value: 0 < value < float("inf"))
