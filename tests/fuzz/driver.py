"""Runs the kinds: starts children, notes which file stopped a child, and starts the next child."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.child import DETAIL, Begun, Ended, Limits

ROOT = Path(__file__).parents[2]
OUTCOMES = ("right", "refused", "wrong", "crashed", "hung")
MOST_DEATHS = 20  # of children; then the kind is broken, and a new child takes seconds
START_SECONDS = 600  # a child imports PyTorch, maybe on a busy machine
POLL_SECONDS = 0.1
# Arguments: kind, first seed, end of the seeds, folder, limits as JSON, descriptor of the pipe.
CHILD = """
import json, sys
from multiprocessing.connection import Connection
from pathlib import Path
from tests.fuzz.child import Limits, work
kind, first, end, folder, limits, pipe = sys.argv[1:]
with Connection(int(pipe), readable=False) as parent:
    work(kind, range(int(first), int(end)), Path(folder), Limits(**json.loads(limits)), parent)
"""


@dataclass
class Report:
    """What became of the files of one kind, by seed."""

    kind: str
    files: dict[int, Ended] = field(default_factory=dict)

    def count(self, outcome: str) -> int:
        return sum(ended.outcome == outcome for ended in self.files.values())

    @property
    def failures(self) -> list[Ended]:
        """The files that were wrong, crashed or hung."""
        return [e for e in self.files.values() if e.outcome not in ("right", "refused")]

    @property
    def seconds(self) -> float:
        """The most CPU time of one file."""
        return max((ended.seconds for ended in self.files.values()), default=0.0)

    @property
    def growth(self) -> int:
        """The most bytes by which one file made the memory grow."""
        return max((ended.growth for ended in self.files.values()), default=0)


@dataclass(frozen=True)
class Stopped:
    """A child that died, or that has to be killed, and the outcome of its last file."""

    outcome: str
    reason: str


class ChildError(RuntimeError):
    """A child ended before its first file: the kind cannot be imported, for example."""


def kinds() -> list[str]:
    """The names of all kinds in this folder."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [m.stem for m in modules if re.search(r"^def attempt\(", m.read_text(), re.MULTILINE)]


def fuzz(kind: str, seeds: range, limits: Limits | None = None) -> Report:
    """Attempt all seeds of a kind, in as many children as it takes.

    Args:
        kind: one of ``kinds()``, or the full name of a module with a dot in it.
        seeds: of the files.
        limits: of each file.

    Raises:
        ChildError: a child did not reach its first file.
    """
    report, deaths = Report(kind), 0
    while seeds and deaths < MOST_DEATHS:
        with TemporaryDirectory() as folder:
            seeds = _one_child(report, seeds, Path(folder), limits or Limits())
        deaths += 1
    return report


def _one_child(report: Report, seeds: range, folder: Path, limits: Limits) -> range:
    """Run a child until it ends, dies or hangs; return the seeds that are left."""
    seed = None
    with _child(report.kind, seeds, folder, limits) as (child, messages):
        for message in _messages(child, messages, limits):
            if isinstance(message, Begun):
                seed = message.seed
            elif isinstance(message, Ended):
                report.files[seed] = message
            else:
                errors = (folder / "errors").read_text(errors="replace")[-DETAIL:]
                detail = f"{message.reason}\n{errors}"
                if seed is None:
                    raise ChildError(f"{report.kind}: {detail}")
                report.files[seed] = Ended(seed, message.outcome, detail, 0.0, 0)
                return range(seed + 1, seeds.stop)
    return range(0)


@contextmanager
def _child(
    kind: str, seeds: range, folder: Path, limits: Limits
) -> Iterator[tuple[subprocess.Popen, Connection]]:
    """A child at work, its standard error in the file "errors", killed at the end."""
    receiver, sender = Pipe(duplex=False)
    module = kind if "." in kind else f"tests.fuzz.{kind}"
    arguments = [seeds.start, seeds.stop, folder, json.dumps(asdict(limits)), sender.fileno()]
    command = [sys.executable, "-c", CHILD, module, *map(str, arguments)]
    search = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    own = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TORCH_HOME"), str(folder / "home"))
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(search)
    with (folder / "errors").open("wb") as errors, receiver:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[sender.fileno()],
            start_new_session=True,
        )
        sender.close()
        try:
            yield child, receiver
        finally:
            child.kill()
            child.wait()


def _messages(
    child: subprocess.Popen, messages: Connection, limits: Limits
) -> Iterator[Begun | Ended | Stopped]:
    """The child's messages until it has done all its files or has stopped."""
    begun, since, most = None, time.monotonic(), START_SECONDS
    while True:
        dead = child.poll() is not None  # asked first: its last words are still in the pipe
        if messages.poll(0 if dead else POLL_SECONDS):
            try:
                message = messages.recv()
            except (EOFError, OSError):
                yield _death(child)
                return
            if message is None:
                return
            begun = message if isinstance(message, Begun) else None
            since, most = time.monotonic(), limits.wall_seconds
            yield message
        elif dead:
            yield _death(child)
            return
        elif begun and _cpu_seconds(child.pid) - begun.cpu > limits.seconds:
            yield Stopped("hung", f"no answer after {limits.seconds:g} s of CPU time")
            return
        elif time.monotonic() - since > most:
            yield Stopped("hung", f"no answer after {most:g} s")
            return


def _death(child: subprocess.Popen) -> Stopped:
    return Stopped("crashed", f"the process died with exit code {child.wait()}")


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5), fields 14 and 15 of its stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
