"""A worker: a process that measures on a GPU in place of this one.

After one illegal access every later CUDA call of a process fails, and a kernel that hangs ends only
with its process. The worker reports each provider before it runs it, so that this process knows
which provider broke the worker.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from emanet_triton.bench.interrupts import no_interrupts
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.bench.rows import Row
from emanet_triton.errors import describe
from emanet_triton.kernels.precision import cuda_fp32

Work = Callable[[Watch], Any]  # it is pickled, so it must be made of functions of modules
SECONDS_TO_START, SECONDS_TO_END = 120, 10  # at most, of a process


def no_rows(row: Row) -> None:
    """For work that reports no rows."""


class Worker:
    """A process that runs work, one piece after the other.

    It starts when there is work. After a process is lost, the next work gets a new process.

    Args:
        silence: seconds without a message after which the process counts as hung.
    """

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._started: tuple[SpawnProcess, Connection] | None = None

    def run(self, work: Work, found: Callable[[Row], None] = no_rows) -> Any:
        """What ``work`` returns. ``found`` gets the rows that the work reports meanwhile.

        Raises:
            Lost: the process raised, ended or hung.
        """
        provider, limit = "", self._silence
        if self._started is None:
            self._started, limit = _start(), max(limit, SECONDS_TO_START)
        process, pipe = self._started
        try:
            pipe.send(work)
            while pipe.poll(limit):
                limit = self._silence  # it has started
                word, content = pipe.recv()
                if word == "done":
                    return content
                if word == "found":
                    found(content)
                elif word == "begins":
                    provider = content
                elif word == "lost":
                    lost = Lost(*content)
                    break
            else:
                lost = Lost(provider, f"hung: no sign of life for {limit:g} s")
        except (EOFError, OSError):  # the other end of the pipe has gone
            lost = Lost(provider, _ending(process))
        self.close()
        raise lost

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._started:
            process, pipe = self._started
            process.kill()
            process.join()
            pipe.close()
        self._started = None


def _start() -> tuple[SpawnProcess, Connection]:
    """A new process and this process's end of the pipe to it."""
    spawn = multiprocessing.get_context("spawn")
    pipe, other = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(other,))
    with no_interrupts():  # this process answers for both
        process.start()
    other.close()
    return process, pipe


def _ending(process: SpawnProcess) -> str:
    process.join(SECONDS_TO_END)
    code = process.exitcode
    if code is not None and code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def is_lost(error: Exception) -> bool:
    """Whether the CUDA context is lost, or may be: then nothing more runs in this process."""
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # a dead context may raise any type
        return True
    return False


class _Pipe(Watch):
    """Reports to the other end of a pipe."""

    early = True

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def begins(self, provider: str) -> None:
        self._pipe.send(("begins", provider))

    def found(self, row: Row) -> None:
        self._pipe.send(("found", row))

    def is_lost(self, error: Exception) -> bool:
        return is_lost(error)


def _serve(pipe: Connection) -> None:
    """Run all work that comes, until the pipe is closed or this process is lost."""
    watch = _Pipe(pipe)
    pipe.send(("started", None))
    with cuda_fp32("ieee"):  # TF32 would make fp32 faster and less exact
        while True:
            try:
                work = pipe.recv()
            except EOFError:  # the process that wanted work has gone
                return
            try:
                pipe.send(("done", work(watch)))
            except Lost as lost:
                pipe.send(("lost", (lost.provider, lost.reason)))
                return
            except Exception as error:  # no provider raised it, so the work itself is at fault
                pipe.send(("lost", ("", describe(error))))
                return
