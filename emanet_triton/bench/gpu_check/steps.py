"""Commands one after the other within a time: each in a process of its own that ends with it."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emanet_triton.bench.gpu_check.endings import guard
from emanet_triton.bench.rows import PASSED

GRACE = 8.0  # seconds that a step has to write what it has, after its time
KEEP_EVERY = 15.0  # seconds after which what a step has written so far is kept
LOG = "log.txt"
OUT = "{out}"  # in a command: the folder of its step
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: of its folder, too.
        command: what runs; ``OUT`` in it stands for that folder.
        seconds: that it may take, by estimate. What the steps before have left, it may take too.
        needs: a program or a module without which it is absent.
        absent: why it does not run at all, if so.
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
        result: "passed", "absent: why" or what else.
        seconds: that it took.
        compiled: kernels that were compiled meanwhile.
    """

    step: Step
    folder: Path
    result: str
    seconds: float = 0.0
    compiled: int = 0

    @property
    def failed(self) -> bool:
        return self.result != PASSED and not self.result.startswith("absent")


@dataclass
class Runner:
    """Runs steps.

    Attributes:
        work: gets a folder for each step.
        environment: of their processes.
        count: how many kernels are compiled by now.
        keep: is called now and then while a step runs, which may have written files.
        finished: gets the outcomes so far after each step.
        seconds: of all steps together.
        grace: between asking a step to end and ending it.
        outcomes: so far.
    """

    work: Path
    environment: Mapping[str, str]
    count: Callable[[], int]
    keep: Callable[[], None]
    finished: Callable[[Sequence[Outcome]], None]
    seconds: float
    grace: float = GRACE
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, steps: Sequence[Step]) -> None:
        """Run them in order; what has no time left is not started.

        Raises:
            KeyboardInterrupt: after the running step has ended and its outcome is noted.
        """
        end = time.monotonic() + self.seconds
        for number, step in enumerate(steps):
            left = end - time.monotonic() - self.grace
            spare = left - sum(later.seconds for later in steps[number:])
            folder = self.work / f"{number:02}-{step.name}"
            self._run(step, folder, min(left, step.seconds + max(0.0, spare)))
            self.finished(self.outcomes)
            with contextlib.suppress(OSError):  # the terminal may have gone
                print(f"{step.name}: {self.outcomes[-1].result}", file=sys.stderr, flush=True)

    def _run(self, step: Step, folder: Path, limit: float) -> None:
        if absent := why_absent(step):
            self.outcomes.append(Outcome(step, folder, f"absent: {absent}"))
            return
        if limit <= 0:
            self.outcomes.append(Outcome(step, folder, "not started: no time left"))
            return
        folder.mkdir(parents=True)
        before, begin, result = self.count(), time.monotonic(), INTERRUPTED
        try:
            result = self._result(step, folder, limit)
        finally:
            took, compiled = time.monotonic() - begin, self.count() - before
            self.outcomes.append(Outcome(step, folder, result, took, compiled))

    def _result(self, step: Step, folder: Path, limit: float) -> str:
        command = [part.replace(OUT, str(folder)) for part in step.command]
        with guard() as ends_with_us, (folder / LOG).open("w") as log:
            log.write(f"{' '.join(command)}\n")
            log.flush()
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    process_group=0,  # so that its own children end with it
                )
            except OSError as error:
                return f"failed: cannot be started: {error.strerror}"
            try:
                ends_with_us(process.pid)
                code = self._wait(process, limit)
            finally:
                hung = self._end(process)
        if code is None:
            return f"failed: not done after {limit:.0f} s" + (", and hung" if hung else "")
        return PASSED if code == 0 else f"failed: {_describe(code)}"

    def _wait(self, process: subprocess.Popen, limit: float) -> int | None:
        """Its exit code; None if it takes longer."""
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(min(left, KEEP_EVERY))
            except subprocess.TimeoutExpired:
                self.keep()
        return None

    def _end(self, process: subprocess.Popen) -> bool:
        """End it and all that it has started; whether it had to be killed."""
        hung = False
        try:
            if process.poll() is None:
                _signal(process, signal.SIGINT)  # a suite then keeps the rows that it has
                process.wait(self.grace)
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
        return hung


def why_absent(step: Step) -> str:
    """Why a step cannot run here; empty if it can."""
    if step.absent or not step.needs:
        return step.absent
    if shutil.which(step.needs) or importlib.util.find_spec(step.needs.replace("-", "_")):
        return ""
    return f"there is no {step.needs} here"


def environment(root: Path, triton_cache: Path, package_cache: Path) -> dict[str, str]:
    """Of the steps: kernels run natively and are kept in these folders.

    Args:
        root: the folder of the package's folder.
        triton_cache: of Triton.
        package_cache: of this package and others, ``XDG_CACHE_HOME``.
    """
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = str(root), kept.get("PYTHONPATH", "")
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(triton_cache),
        "XDG_CACHE_HOME": str(package_cache),
    }


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # all have ended
        return


def _describe(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
