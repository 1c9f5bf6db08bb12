"""A worker: a process that measures on a GPU in place of this one.

After one illegal access every later CUDA call of a process fails, and a kernel that hangs ends only
with its process. The worker reports each provider before it runs it, so that this process knows
which provider broke the worker.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from emanet_triton.bench.interrupts import no_interrupts
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.bench.rows import Row
from emanet_triton.errors import describe
from emanet_triton.kernels.precision import cuda_fp32

Work = Callable[[Watch], Any]  # it is pickled, so it must be made of functions of modules
SECONDS_TO_START, SECONDS_TO_END = 120, 10  # at most, of a process


class Worker:
    """Runs work in a process of its own, one piece after the other.

    Args:
        silence: seconds without a message after which the process counts as hung.
    """

    def __init__(self, silence: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._silence = silence
        self._limit = max(silence, SECONDS_TO_START)
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(other,))
        with no_interrupts():  # this process answers for both
            self._process.start()
        other.close()

    def run(self, work: Work, found: Callable[[Row], None]) -> Any:
        """What ``work`` returns. ``found`` gets the rows that the work reports meanwhile.

        Raises:
            Lost: the process raised, ended or hung. The worker must be closed.
        """
        provider = ""
        try:
            self._pipe.send(work)
            while True:
                if not self._pipe.poll(self._limit):
                    raise Lost(provider, f"hung: no sign of life for {self._limit:g} s")
                self._limit = self._silence  # it has started
                word, content = self._pipe.recv()
                if word == "begins":
                    provider = content
                elif word == "found":
                    found(content)
                elif word == "lost":
                    raise Lost(*content)
                elif word == "done":
                    return content
        except (EOFError, OSError):  # the other end of the pipe has gone
            raise Lost(provider, self._end()) from None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _end(self) -> str:
        self._process.join(SECONDS_TO_END)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"its process ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}"


class Workers:
    """One worker at a time. A lost worker is replaced when there is more work.

    Args:
        silence: as for ``Worker``.
    """

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._worker: Worker | None = None

    def run(self, work: Work, found: Callable[[Row], None]) -> Any:
        """As ``Worker.run``."""
        self._worker = self._worker or Worker(self._silence)
        try:
            return self._worker.run(work, found)
        except Lost:
            self.close()
            raise

    def close(self) -> None:
        if self._worker:
            self._worker.close()
        self._worker = None


def no_rows(row: Row) -> None:
    """For work that reports no rows."""


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
