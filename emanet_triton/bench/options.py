"""The command line of ``python -m emanet_triton.bench``."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.neighbour import PROGRAMS
from emanet_triton.command import Parser, count
from emanet_triton.errors import InputError

NETWORKS = ("r50", "r101")
THREADS = "on the CPU; default: PyTorch's number, at most the cores that this process may use"
Size = tuple[int, int]  # (height, width) of an image in pixels
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """What to run. An empty tuple is the suite's own choice for the device.

    Attributes:
        device: "cpu" or "cuda".
        quick: the short selection of a run without arguments.
        tiny: the smallest cases that still run everything, for tests and warm-up.
        sizes: (height, width) of images in pixels.
        batches: images at once.
        dtypes: "fp32", "bf16", "fp16".
        networks: "r50", "r101".
        providers: their names.
        threads: PyTorch's on the CPU; 0 leaves them as they are.
    """

    device: str = "cpu"
    quick: bool = False
    tiny: bool = False
    sizes: tuple[Size, ...] = ()
    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    threads: int = 0

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def short(self) -> bool:
        """Whether what takes long to prepare, such as compiling, is left out."""
        return self.quick or self.tiny

    def pick(
        self, providers: Mapping[str, T], baseline: str, leave_out: Iterable[str] = ()
    ) -> dict[str, T]:
        """The providers asked for, or all but ``leave_out``; always the baseline, which is first.

        Args:
            providers: all that the case has.
            baseline: one of them.
            leave_out: those that have to be asked for.
        """
        wanted = set(self.providers or set(providers) - set(leave_out)) | {baseline}
        names = dict.fromkeys((baseline, *providers))
        return {name: providers[name] for name in names if name in wanted}


def parse(arguments: Sequence[str], suites: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of a run.

    Raises:
        InputError: they are not as they should be.
    """
    parser = Parser(
        prog="python -m emanet_triton.bench",
        description="Time EMANet and its parts against their peers. Without arguments: a short "
        "selection for the device found.",
        epilog="also: report [--check], which rebuilds docs/benchmarks.md from results; "
        "compare A.csv B.csv, which says what got faster or slower; gpu-check --stage "
        "run|profile|rows, which does all that needs a GPU",
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of {', '.join(suites)}; default: all, short"
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--providers", nargs="+", default=[], metavar="NAME")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    what.add_argument("--threads", type=count, default=0, metavar="N", help=THREADS)
    what.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[])
    what.add_argument(
        "--sizes", nargs="+", type=_size, default=[], metavar="HxW", help="of images, in pixels"
    )
    what.add_argument("--batches", nargs="+", type=count, default=[], metavar="N")
    what.add_argument("--networks", nargs="+", choices=NETWORKS, default=[])
    what.add_argument(
        "--cases", nargs="+", default=[], metavar="TEXT", help="cases whose name contains a TEXT"
    )
    what.add_argument("--tiny", action="store_true", help="smallest cases: whether all runs")

    how = parser.add_argument_group("how long")
    how.add_argument("--rounds", type=count, metavar="N", help="default: 15; in a short run 5")
    how.add_argument("--seconds", type=_positive, metavar="S", help="budget of timing a case")
    how.add_argument(
        "--repeat-until",
        type=_positive,
        metavar="REL",
        help="go on until the relative error of every median is at most this, or the budget ends",
    )
    how.add_argument(
        "--silence",
        type=_positive,
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
    output.add_argument("--csv", type=Path, metavar="FILE")
    output.add_argument("--json", type=Path, metavar="FILE")
    output.add_argument("--plot", type=Path, metavar="DIR", help="charts (extra: plot)")

    options = parser.parse_args(arguments)
    for suite in options.suites:
        if suite not in suites:
            raise InputError(f"unknown suite '{suite}'; expected one of: {', '.join(suites)}")
    return options


def _size(text: str) -> Size:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, got '{text}'")
    return int(height), int(width)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got '{text}'")
    return value
