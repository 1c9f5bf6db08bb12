"""Compile every shipped configuration for its target, without a GPU, and check the result.

    python -m emanet_triton.bench.ahead_of_time.gates [--write PATH] [--each use|tile|kernel]

The table in ``benchmarks/results/compiled.csv`` has rows of several Triton versions; a run replaces
the rows of its own version.

The operators' own launchers run on tensors of the meta device, under a driver that only names a
target. So each kernel is compiled exactly as it would be launched.
"""

import argparse
import csv
import functools
import io
import multiprocessing
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TextIO
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from emanet_triton.bench.ahead_of_time.code import Figures, figures
from emanet_triton.bench.ahead_of_time.launches import Each, Group, Launch, groups
from emanet_triton.command import Parser, answer, complain, program, run
from emanet_triton.cores import usable_cores
from emanet_triton.errors import InputError, first_line
from emanet_triton.files import is_stream, require_writable, write_output

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory of a program; sm_80 has 166,912, but smaller GPUs use its tiles, too.
SHARED_LIMITS = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
IN_GLUON = ("conv_boxes", "em_stage", "em_output")
# Constants of a tile, beside its blocks.
TILE_NAMES = ("PRECISION", "P", "R", "ROWS", "CHAINS", "BUFFERS", "OUTS")

COLUMNS = (
    *("kernel", "target", "dtype", "configuration", "constants"),
    *Figures._fields,
    "triton",
)
KEY = (*COLUMNS[:5], "triton")
# Versions of Triton with which every gate has held. Another version may use more registers, so its
# problems are printed, but only a kernel that would not fit is a failure.
SEEN = ("3.6", "3.7", "3.8", "3.9")


class Compiled(NamedTuple):
    """Rows of kernels that compile, and messages about kernels that do not."""

    rows: list[dict[str, str]]
    failures: list[str]


def compile_group(group: Group) -> Compiled:
    """Run the launchers of a group: a row for each of their kernels of interest."""
    rows, failures, seen = [], [], set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = self.__name__
        key = _key(kernel, launch, kwargs)
        once = key[: group.each]
        if once in seen or not (launch.kernels is None or kernel in launch.kernels):
            return
        seen.add(once)
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever a compiler may raise
            failures.append(f"{', '.join(key)}: does not compile: {first_line(error)}")
            return
        values = *key, *map(str, figures(compiled)), triton.__version__
        rows.append(dict(zip(COLUMNS, values, strict=True)))

    for launch in group.launches:
        triton.runtime.driver.set_active(Compiler(launch.arch))
        hip = "a version" if TARGETS[launch.arch].backend == "hip" else None
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(torch.version, "hip", hip),
        ):
            launch.run()
    return Compiled(rows, failures)


class Compiler:
    """A Triton driver of an architecture: it answers all that a launch asks before it starts."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


def _key(kernel: str, launch: Launch, arguments: dict) -> tuple[str, ...]:
    meta = {n: v for n, v in arguments.items() if n.startswith("BLOCK") or n in TILE_NAMES}
    constants = [f"{n}={v}" for n, v in arguments.items() if n.isupper() and n not in meta]
    tile = configuration(meta, arguments["num_warps"], arguments.get("num_stages"))
    return kernel, launch.arch, launch.dtype, tile, " ".join((*constants, launch.note))


def configuration(meta: Mapping[str, object], num_warps: int, num_stages: int | None) -> str:
    """A tile as the table writes it."""
    options = dict(sorted(meta.items())) | {"num_warps": num_warps, "num_stages": num_stages}
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def compile_all(each: Each, processes: int) -> Compiled:
    """What ``groups`` says, sorted; each process compiles a group at a time."""
    context = multiprocessing.get_context("spawn")
    # Ctrl-C ends the processes silently; this process prints the message.
    end = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(processes, context, initializer=end) as pool:
        done = list(pool.map(compile_group, groups(each)))
    rows = {tuple(row[name] for name in KEY): row for found in done for row in found.rows}
    failures = [failure for found in done for failure in found.failures]
    return Compiled([rows[key] for key in sorted(rows)], failures)


def problems(rows: Iterable[dict[str, str]]) -> list[str]:
    """What breaks a gate, a message each.

    These are: a stack, too much shared memory, no tensor-core instruction where one is expected,
    products of a convolution or of a kernel in Gluon that wait for one another, and loads that are
    narrower than contiguous memory and the tile allow.
    """
    found = []
    for row in rows:
        what = ", ".join(row[name] for name in KEY)
        limit = SHARED_LIMITS[row["target"]]
        if int(row["stack"]):
            found.append(f"{what}: {row['stack']} bytes of stack")
        if int(row["shared"]) > limit:
            found.append(f"{what}: {row['shared']} bytes of shared memory, over {limit}")
        if uses_tensor_cores(row) != bool(int(row["count"])):
            found.append(f"{what}: {row['count']} tensor-core instructions")
        # If the assembler serialises products, a wait follows each of them. Two waits are normal,
        # one in the loop and one after it; four for 20 products in ``em_output``.
        is_loop = row["kernel"].startswith("conv_") or row["kernel"] in IN_GLUON
        if is_loop and int(row["waits"]) > max(2, int(row["count"]) // 2):
            found.append(f"{what}: {row['waits']} waits for {row['count']} products")
        if loads_are_contiguous(row) and int(row["load"]) < int(row["full_load"]):
            found.append(f"{what}: loads of {row['load']} bytes, not {row['full_load']}")
    return found


def does_not_fit(rows: Iterable[dict[str, str]]) -> list[str]:
    """The problems that keep a kernel from starting: too much shared memory."""
    return [problem for problem in problems(rows) if "of shared memory, over" in problem]


def is_seen(version: str) -> bool:
    """Whether every gate has held with this version of Triton."""
    return ".".join(re.split(r"\D", version)[:2]) in SEEN


def uses_tensor_cores(row: dict[str, str]) -> bool:
    """Whether a kernel should: all products do, except exact fp32 products on NVIDIA GPUs."""
    if "PRECISION" not in row["configuration"]:
        return row["kernel"] in ("conv_expand_reduce", *IN_GLUON)
    of_half = row["dtype"] != "fp32" and row["kernel"] not in ("em_project", "em_fold")
    return of_half or "PRECISION=ieee" not in row["configuration"] or row["target"] == "gfx942"


def loads_are_contiguous(row: dict[str, str]) -> bool:
    """Whether a thread can load 16 bytes at once.

    It cannot where interpolation gathers, in NCHW features with an odd number of positions, and in
    images of few channels. It cannot either for some TF32 products on sm_90 and sm_100: they read
    their operands along the summed axis, and memory is contiguous along the other axis.
    """
    narrow = {"resample_kernel", "conv_taps"}
    if row["target"] in ("sm_90", "sm_100") and "PRECISION=tf32 " in row["configuration"]:
        narrow |= {"em_m_step", "em_epilogue"}
    return row["kernel"] not in narrow and "NCHW" not in row["constants"].split()


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table that ``--write`` wrote.

    Raises:
        InputError: the file is no such table.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table: {first_line(error)}") from None
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row.values() for row in rows):
        raise InputError(f"{path}: expected a table with the columns {', '.join(COLUMNS)}")
    return rows


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Write rows to a table; its rows of other versions of Triton stay.

    Raises:
        InputError: the path is another file, or cannot be written.
    """
    earlier = _earlier(path)
    versions = {row["triton"] for row in rows}
    rows = rows + [row for row in earlier if row["triton"] not in versions]
    text = io.StringIO()
    _write(text, sorted(rows, key=lambda row: [row[name] for name in KEY]))
    write_output(path, text.getvalue().encode())


def _earlier(path: Path) -> list[dict[str, str]]:
    return read_table(path) if path.exists() and not is_stream(path) else []


def _write(file: TextIO, rows: list[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def main() -> int:
    """0 if every gate holds, 1 if not, 2 for bad input."""
    interrupted = "interrupted: Triton keeps what it has compiled"
    return answer(lambda: _run(_options()), interrupted)


def _options() -> argparse.Namespace:
    parser = Parser(
        prog=program("bench.ahead_of_time.gates"),
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="PATH",
        help="CSV file instead of a print; rows of other versions of Triton stay",
    )
    parser.add_argument(
        "--each",
        choices=[each.name.lower() for each in Each],
        default="use",
        help="compile every tile in each use (default); or every tile once, in its commonest use; "
        "or each kernel once in every dtype, with one of its tiles",
    )
    parser.add_argument("--processes", type=int, default=usable_cores())
    return parser.parse_args()


def _run(options: argparse.Namespace) -> int:
    if triton.knobs.runtime.interpret:
        raise InputError("nothing is compiled while TRITON_INTERPRET is set")
    if options.processes < 1:
        raise InputError(f"--processes: expected at least 1, got {options.processes}")
    if options.write:
        require_writable(options.write)  # before the minutes that follow
        _earlier(options.write)
    rows, failures = compile_all(Each[options.each.upper()], options.processes)
    if options.write:
        write_table(options.write, rows)
    else:
        _write(sys.stdout, rows)
    for problem in (*failures, *problems(rows)):
        complain(problem)
    counted = problems if is_seen(triton.__version__) else does_not_fit
    return 1 if failures or counted(rows) else 0


if __name__ == "__main__":
    run(main)
