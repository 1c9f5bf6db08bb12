"""A step of a stage: a command in a process of its own, and how it ended."""

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emanet_triton.bench.gpu_check.endings import guard
from emanet_triton.bench.rows import PASSED

GRACE = 8.0  # seconds that a step has to write its results after its time is up
KEEP_EVERY = 15.0  # seconds after which the files of a running step are kept
LOG = "log.txt"
OUT = "{out}"  # in a command: the folder of its step


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: also of its folder.
        command: the program and its arguments; ``OUT`` in them stands for that folder.
        seconds: its share of the stage's time. It may also use what earlier steps have left.
        needs: a program or a module; the step is absent where there is none.
        absent: why the step does not run at all; empty if it does.
    """

    name: str
    command: Sequence[str]
    seconds: float
    needs: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        step: which.
        folder: of its files.
        result: "passed", "absent: why", "failed: why" or why else it did not end.
        seconds: its duration.
        compiled: how many kernels were compiled meanwhile.
    """

    step: Step
    folder: Path
    result: str
    seconds: float = 0.0
    compiled: int = 0

    @property
    def failed(self) -> bool:
        return self.result != PASSED and not self.result.startswith("absent")


def run_command(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    limit: float,
    grace: float,
    keep: Callable[[], None],
) -> str:
    """Run a command until it ends or its time is up. All its processes end with it.

    Args:
        command: the program and its arguments; ``OUT`` in them stands for the folder.
        folder: gets its log.
        environment: of its process.
        limit: its seconds.
        grace: seconds between asking it to end and killing it.
        keep: is called now and then while it runs.

    Returns:
        "passed" or "failed: why".
    """
    command = [part.replace(OUT, str(folder)) for part in command]
    with guard() as ends_with_us, (folder / LOG).open("w") as log:
        log.write(f"{' '.join(command)}\n")
        log.flush()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # so that its own children end with it
            )
        except OSError as error:
            return f"failed: cannot be started: {error.strerror}"
        try:
            ends_with_us(process.pid)
            code = _wait(process, limit, keep)
        finally:
            hung = _end(process, grace)
    if code is None:
        return f"failed: not done after {limit:.0f} s" + (", and hung" if hung else "")
    if code:
        said = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        return f"failed: {said}"
    return PASSED


def _wait(process: subprocess.Popen[bytes], limit: float, keep: Callable[[], None]) -> int | None:
    """Wait for the exit code of a process; None if the process takes longer than the limit."""
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        try:
            return process.wait(min(left, KEEP_EVERY))
        except subprocess.TimeoutExpired:
            keep()
    return None


def _end(process: subprocess.Popen[bytes], grace: float) -> bool:
    """End a process and all that it has started. Returns whether it had to be killed."""
    hung = False
    try:
        if process.poll() is None:
            _signal(process, signal.SIGINT)  # a suite then keeps the rows that it has
            process.wait(grace)
    except subprocess.TimeoutExpired:
        hung = True
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()
    return hung


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and to all that it has started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # all have ended
        return


def why_absent(step: Step) -> str:
    """Why a step cannot run here; empty if it can."""
    if step.absent or not step.needs:
        return step.absent
    if shutil.which(step.needs) or importlib.util.find_spec(step.needs.replace("-", "_")):
        return ""
    return f"there is no {step.needs} here"


def environment(root: Path, triton_cache: Path, package_cache: Path) -> dict[str, str]:
    """The environment of steps: kernels run natively, are measured, and are kept in these folders.

    Args:
        root: the folder that holds the folder of the package.
        triton_cache: the cache of Triton.
        package_cache: the cache of this package and others, ``XDG_CACHE_HOME``.
    """
    dropped = "TRITON_INTERPRET", "EMANET_TRITON_CONV_SEARCH"
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    paths = str(root), kept.get("PYTHONPATH", "")
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(triton_cache),
        "XDG_CACHE_HOME": str(package_cache),
    }
