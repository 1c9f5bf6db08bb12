"""``gpu-check``: everything that needs a GPU, within eight minutes, into one folder.

Each step is a process of its own with a time limit: what crashes or hangs ends alone. First
whether the kernels are correct on this GPU, then the suites. The folder gets a CSV file for each
suite and one log.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from tabulate import tabulate

from emanet_triton.bench.options import Parser
from emanet_triton.bench.rows import PASSED, Row, read_rows
from emanet_triton.errors import InputError

SECONDS = 470  # of all steps
GRACE = 10  # seconds that a step has to write what it has, after its time
ROOT = Path(__file__).parents[2]
LOG = "log.txt"
BENCH = (sys.executable, "-m", "emanet_triton.bench")

# Of each kernel: the files that test it, the suites whose smallest cases stand in for them where
# there is no pytest, and seconds.
CORRECTNESS = {
    "em": (("test_em_attention.py", "test_em_block.py", "test_ops.py"), ("em",), 55),
    "post": (("test_resample.py",), ("post",), 30),
    "conv": (("test_conv.py", "test_conv_bottleneck.py"), ("conv",), 40),
    "model": ((), ("model",), 30),
}
SUITES = {  # arguments that fit the time, and seconds
    "em": ("--sizes 1024x2048 --batches 1 8 --dtypes bf16 fp32 --seconds 1", 75),
    "model": (
        "--networks r50 --seconds 2 --providers plain-fp32 plain-bf16 fused-fp32 fused-bf16",
        65,
    ),
    "post": ("--seconds 1 --providers plain torch triton", 30),
    "conv": ("--dtypes bf16 --seconds 0.5 --providers torch cudnn triton", 60),
    "train-mem": ("--rounds 3", 35),
    "scale": ("--rounds 3", 40),
    "eval": ("--rounds 3", 40),
}


@dataclass(frozen=True)
class Step:
    """A command and the seconds that it may take; ``rows`` is the CSV file that it writes."""

    name: str
    command: Sequence[str]
    seconds: float
    rows: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed" or why not, and after how many seconds."""

    step: Step
    result: str
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Run all steps: 0, 1 where one failed, 2 where there is no GPU.

    Raises:
        InputError: bad arguments, no GPU, or a folder that cannot be written.
    """
    parser = Parser(prog="python -m emanet_triton.bench gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("gpu-check needs a GPU, and PyTorch finds none here")
    return run_steps(gpu_steps(options.out), options.out, SECONDS)


def gpu_steps(out: Path) -> list[Step]:
    """Correctness first, by pytest where it is, then the suites."""
    steps = []
    tests = ROOT / "tests" / "kernels"
    has_tests = importlib.util.find_spec("pytest") is not None and tests.is_dir()
    for name, (files, suites, seconds) in CORRECTNESS.items():
        if has_tests and files:
            paths = [str(tests / file) for file in files]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        else:
            command = [*BENCH, *suites, "--tiny", "--device", "cuda", "--rounds", "3"]
        steps.append(Step(f"correct: {name}", command, seconds))
    for suite, (given, seconds) in SUITES.items():
        rows = out / f"{suite.replace('-', '_')}.csv"
        command = [*BENCH, suite, "--device", "cuda", *given.split(), "--csv", str(rows)]
        steps.append(Step(suite, command, seconds, rows))
    return steps


def run_steps(steps: Sequence[Step], out: Path, seconds: float, grace: float = GRACE) -> int:
    """Run steps one after the other, then print a summary: 1 where one failed, else 0.

    Args:
        steps: in their order.
        out: folder for the log.
        seconds: of all steps; what has no time left is not started.
        grace: seconds between asking a step to end and ending it.

    Raises:
        InputError: the folder cannot be written.
    """
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = (out / LOG).open("w")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    with log:
        try:
            for step in steps:
                outcomes.append(_run(step, log, end - time.monotonic(), grace))
                print(f"{step.name}: {outcomes[-1].result}", file=sys.stderr)
        finally:
            text = summary(outcomes)
            log.write(f"\n{text}\n")
            print(text)
    return 0 if all(outcome.result == PASSED for outcome in outcomes) else 1


def _run(step: Step, log: TextIO, left: float, grace: float) -> Outcome:
    limit = min(step.seconds, left - grace)
    if limit <= 0:
        return Outcome(step, "not started: no time left", 0.0)
    log.write(f"\n=== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # so that its own children end with it
    )
    try:
        code = process.wait(limit)
        result = PASSED if code == 0 else f"failed: {_describe(code)}"
    except subprocess.TimeoutExpired:
        result = f"failed: not done after {limit:.0f} s"
        _signal(process, signal.SIGINT)  # a suite then keeps the rows that it has
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            result += ", and hung"
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
    return Outcome(step, result, time.monotonic() - start)


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # all have ended
        return


def _describe(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each step, then what went wrong in the rows."""
    lines, wrong = [], []
    for outcome in outcomes:
        rows = _rows_of(outcome.step)
        passed = sum(row.gate == PASSED for row in rows)
        counted = f"{passed} of {len(rows)}" if outcome.step.rows else ""
        ratios = ", ".join(_ratios(rows))
        cells = [outcome.step.name, outcome.result, f"{outcome.seconds:.0f}", counted, ratios]
        lines.append(cells)
        bad = (row for row in rows if row.gate.startswith("failed"))
        wrong += [f"{row.suite}: {row.case}: {row.provider} {row.gate}" for row in bad]
    columns = ["step", "result", "s", "rows passed", "times faster than the baseline"]
    return "\n".join([tabulate(lines, columns, disable_numparse=True), *wrong])


def _rows_of(step: Step) -> list[Row]:
    if step.rows is None or not step.rows.exists():
        return []
    try:
        return read_rows(step.rows)
    except InputError:  # killed while it wrote
        return []


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    """The least and the largest ratio of every provider but the baseline."""
    for provider in dict.fromkeys(row.provider for row in rows):
        ratios = [row.ratio for row in rows if row.provider == provider and row.ratio]
        if ratios and set(ratios) != {1.0}:
            yield f"{provider} {min(ratios):.2f}–{max(ratios):.2f}"
