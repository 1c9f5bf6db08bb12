"""What the steps' own commands share: options, files of rows."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from emanet_triton.bench.options import count
from emanet_triton.command import Parser, answer, run
from emanet_triton.cores import usable_cores
from emanet_triton.errors import InputError
from emanet_triton.files import write_whole
from emanet_triton.kernels.tile import ARCHS

DEVICE = "cuda"  # where the steps measure
REHEARSAL = "rehearsal: nothing was measured"  # in the place of a device, or of a result
# Files of the steps, of which the summary tells.
CORRECT, WARM, SWEEP, VERSIONS = "correct.jsonl", "warm.json", "sweep.csv", "versions.json"
SWEEP_SUITE = "sweep"  # of its rows
SHIPPED = " shipped"  # ends the name of the shipped tile in these rows


class StepParser(Parser):
    """Of a step's command; ``measures``: it needs a GPU, unless it is rehearsed."""

    measures = True

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:
        """As argparse does.

        Raises:
            InputError: bad arguments, no GPU, or a folder that cannot be made.
        """
        options = super().parse_args(arguments)
        if self.measures and not options.rehearse:
            check_gpu(self.prog)
        make_folder(options.out)
        return options


def parser(module: str, description: str, *, measures: bool = True) -> StepParser:
    """Of a step's command."""
    prog = f"python -m emanet_triton.bench.gpu_check.{module}"
    made = StepParser(prog=prog, description=description)
    made.measures = measures
    made.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="for its files")
    made.add_argument("--tiny", action="store_true", help="little of everything: whether it runs")
    made.add_argument("--rehearse", action="store_true", help="without a GPU: nothing is measured")
    made.add_argument("--arch", choices=ARCHS, default="sm_90", help="of a rehearsal")
    return made


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


def add_processes(made: Parser) -> None:
    """The option of commands that run in several processes."""
    made.add_argument("--processes", type=count, default=usable_cores(), metavar="N")


def run_main(main: Callable[[Sequence[str]], int]) -> None:
    """Run a step's command as a program, and exit."""
    interrupted = "interrupted; what is finished is in the files"
    run(lambda: answer(lambda: main(sys.argv[1:]), interrupted))


def write_table(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows of the same columns as a CSV file."""
    rows, text = list(rows), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def append_json(path: Path, value: object) -> None:
    """Add a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def read_json_lines(path: Path) -> list[dict]:
    """The lines of such a file, but for a last one that was cut off; none if it is missing."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_json(path: Path) -> dict:
    """The object in a file of JSON; an empty one where there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
