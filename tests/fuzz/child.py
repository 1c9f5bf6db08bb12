"""The process that makes and reads the files. It names each file to its parent beforehand."""

import contextlib
import faulthandler
import importlib
import resource
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

Attempt = Callable[[int, Path], str]
DETAIL = 3000  # characters of a traceback that are kept: its end


@dataclass(frozen=True)
class Limits:
    """What one file may cost.

    Attributes:
        seconds: of CPU time, so that a busy machine raises no false alarm.
        wall_seconds: for a file that waits and takes no CPU time.
        growth: bytes by which the resident memory may grow, where the system measures it.
        space: bytes of address space beyond the imports; a larger allocation fails.
    """

    seconds: float = 5.0
    wall_seconds: float = 60.0
    growth: int = 2**30
    space: int = 2**31


@dataclass(frozen=True)
class Begun:
    """File ``seed`` is about to be made; ``cpu`` is the CPU time of the process so far."""

    seed: int
    cpu: float


@dataclass(frozen=True)
class Ended:
    """What became of a file, its CPU time in seconds and its peak of memory in bytes."""

    seed: int
    outcome: str
    detail: str
    seconds: float
    growth: int


def work(kind: str, seeds: range, folder: Path, limits: Limits, parent: Connection) -> None:
    """Attempt all seeds of the kind (a module's full name); ``parent`` gets each message.

    The last message is ``None``.
    """
    faulthandler.enable()
    attempt = importlib.import_module(kind).attempt
    space = _status("VmSize") + limits.space
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        parent.send(Begun(seed, time.process_time()))
        parent.send(_measured(attempt, seed, folder / str(seed), limits))
    parent.send(None)


def _measured(attempt: Attempt, seed: int, folder: Path, limits: Limits) -> Ended:
    folder.mkdir()
    _forget_peak()
    memory, begun = _status("VmRSS"), time.process_time()
    outcome, detail = _outcome(attempt, seed, folder)
    seconds, growth = time.process_time() - begun, _status("VmHWM") - memory
    shutil.rmtree(folder, ignore_errors=True)
    if outcome in ("right", "refused"):
        if seconds > limits.seconds:
            outcome, detail = "hung", f"it took {seconds:.1f} s of CPU time ({outcome})"
        elif growth > limits.growth:
            outcome, detail = "crashed", f"memory grew by {growth / 2**20:.0f} MiB ({outcome})"
    return Ended(seed, outcome, detail, seconds, growth)


def _outcome(attempt: Attempt, seed: int, folder: Path) -> tuple[str, str]:
    try:
        outcome = attempt(seed, folder)
    except AssertionError:
        return "wrong", _traceback()
    except BaseException:
        return "crashed", _traceback()
    if outcome not in ("right", "refused"):
        return "crashed", f"attempt returned {outcome!r}"
    return outcome, ""


def _traceback() -> str:
    return traceback.format_exc()[-DETAIL:]


def _status(key: str) -> int:
    """A line of this process's /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)


def _forget_peak() -> None:
    """Begin the peak of resident memory anew.

    If the system does not allow this, only memory beyond all earlier peaks is measured.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
