"""What the commands of the steps share: options, names and files."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from emanet_triton.command import Parser, answer, count, program, run
from emanet_triton.cores import usable_cores
from emanet_triton.errors import InputError
from emanet_triton.kernels.tile import ARCHS

DEVICE = "cuda"  # where the steps measure
REHEARSAL = "rehearsal: nothing was measured"  # stands for a device, or for a result
# Files of the steps that the summary reads.
CORRECT, WARM, SWEEP, VERSIONS = "correct.jsonl", "warm.json", "sweep.csv", "versions.json"
SILENCE = 45  # seconds without a sign of life after which a provider or a case is given up
SWEEP_SUITE = "sweep"  # in the rows of the sweep
SHIPPED = " shipped"  # in these rows, the end of the shipped tile's name


class StepParser(Parser):
    """Reads the options of a step's command.

    Args:
        module: of this package: the command.
        description: for ``--help``.
        measures: whether the command needs a GPU unless it is rehearsed.
    """

    def __init__(self, module: str, description: str | None, *, measures: bool = True) -> None:
        super().__init__(prog=program(f"bench.gpu_check.{module}"), description=description)
        self._measures = measures
        self.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="for its files")
        add_rehearsal(self)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments, and make the folder of ``--out``.

        Raises:
            InputError: bad arguments, no GPU, or a folder that cannot be made.
        """
        options = self.parse_args(arguments)
        if self._measures and not options.rehearse:
            check_gpu(self.prog)
        make_folder(options.out)
        return options


def add_rehearsal(parser: Parser) -> None:
    """Add the options ``--tiny``, ``--rehearse`` and ``--arch``."""
    parser.add_argument("--tiny", action="store_true", help="few, small cases: whether it runs")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: compiles, packs, measures nothing"
    )
    parser.add_argument(
        "--arch", choices=ARCHS, default="sm_90", help="what a rehearsal compiles kernels for"
    )


def add_processes(parser: Parser) -> None:
    """Add the option ``--processes``."""
    parser.add_argument(
        "--processes",
        type=count,
        default=usable_cores(),
        metavar="N",
        help="how many compile at once",
    )


def check_gpu(command: str) -> None:
    """Raises InputError where there is no GPU, and the steps measure on one."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"{command} needs a GPU, and PyTorch finds none here; --rehearse does without"
        )


def make_folder(path: Path) -> None:
    """Make the folder of ``--out``.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--out {path}: is a file, expected a folder") from None
    except OSError as error:
        raise InputError(f"--out {path}: cannot be made: {error.strerror}") from None


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Run a step's command as a program, and exit."""
    interrupted = "interrupted; what is finished is in the files"
    run(lambda: answer(lambda: main(sys.argv[1:]), interrupted))


def append_json(path: Path, value: object) -> None:
    """Add a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in the lines of a file, without a last line that was cut off.

    An empty list if there is no such file.
    """
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if the file is missing or was cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
