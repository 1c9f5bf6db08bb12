"""Run independent items of work in threads of the CPU, each item in one thread.

PyTorch would split every small operation among its threads, which would mostly wait for one
another. Here the threads wait once, at the end. Inside these threads every PyTorch operation uses
one thread, so an item's result has the same bits for any number of threads. A process that is
forked after items were shared uses one thread, also in PyTorch: OpenMP would hang with more.

The threads are PyTorch's own where OpenMP lets us use them (``openmp``). Elsewhere, and in a forked
process, they are threads of a pool.
"""

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import torch

from emanet_triton.kernels.openmp import has_team, run_in_team

SECONDS = 0.1  # longest delay of a signal that arrives just before the calling thread sleeps
SECONDS_TO_END = 5  # how long a process that ends waits for each thread


def num_threads(device: torch.device) -> int:
    """How many threads ``for_each`` uses at most."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def for_each(
    make_run: Callable[[], Callable], items: Sequence[object], device: torch.device
) -> None:
    """Run every item, on a CPU in as many threads as PyTorch is set to use.

    A thread takes the next item when it has finished one, so a thread that another process slows
    takes fewer items. If no thread of the pool can start, the calling thread runs all items.

    Args:
        make_run: returns a function that runs an item. Every thread calls ``make_run`` once.
        items: the work. No two items may write to the same memory.
        device: where the tensors are. If it is no CPU, the calling thread runs all items.

    Raises:
        BaseException: the first error of an item. An exception that a signal raises in the calling
            thread, such as KeyboardInterrupt, takes its place, and may interrupt an item of this
            thread. Items that had not begun are dropped; no item is still running.
    """
    if not items:
        return
    threads = num_threads(device)
    job = _Job(make_run, items)
    if threads == 1 or isinstance(threading.current_thread(), _Worker):
        job.run_items()
    else:
        _share(job, threads, len(items))
    job.raise_error()


def _share(job: "_Job", threads: int, items: int) -> None:
    global _HAS_SHARED
    _HAS_SHARED = True
    if has_team() and not _IS_FORKED:
        run_in_team(job.run_items, job.drop, threads)
    elif pool := _POOL.grown(min(threads, items)):
        job.wait_for(pool, min(threads, items))
    else:
        with _one_thread():
            job.run_items()


class _Job:
    """Items that threads take one by one.

    A signal may interrupt the calling thread while it holds a lock, which nobody would release
    then. So only threads of the pool use the lock, and ``threading.Event``, which has one, is not
    used.
    """

    def __init__(self, make_run: Callable[[], Callable], items: Sequence[object]) -> None:
        self._make_run: Callable[[], Callable] | None = make_run
        self._left = deque(items)
        self._errors: list[BaseException] = []
        self._working, self._lock = 0, threading.Lock()
        self._ended: SimpleQueue[None] = SimpleQueue()

    @torch.inference_mode()  # a setting of each thread
    def run_items(self) -> None:
        """Take items until none is left."""
        if not self._left:
            return
        make_run = self._make_run
        assert make_run is not None  # it is taken away only while no thread works
        run = make_run()
        del make_run
        for item in self._items():
            run(item)

    def work(self) -> None:
        """Take items in a thread of the pool. The last thread to finish ends the job."""
        with self._lock:
            self._working += 1
        try:
            self.run_items()
        except BaseException as error:  # the calling thread raises it
            self.drop(error)
        with self._lock:
            self._working -= 1
            if not self._left and not self._working:
                self._make_run = None  # frees its tensors; no thread does when the process ends
                self._ended.put(None)

    def wait_for(self, pool: "_Pool", threads: int) -> None:
        """Give the job to the pool's threads and wait until it has ended."""
        while self._make_run is not None:
            try:
                while threads:
                    pool.jobs.put(self)
                    threads -= 1
                with contextlib.suppress(Empty):
                    self._ended.get(timeout=SECONDS)
            except BaseException as error:  # such as KeyboardInterrupt
                self.drop(error)

    def drop(self, error: BaseException) -> None:
        """Begin no further item."""
        self._errors.append(error)
        self._left.clear()

    def raise_error(self) -> None:
        """Raise the error, if there is one, and keep none of the tensors that it holds."""
        errors, self._errors = self._errors, []
        errors.sort(key=lambda error: isinstance(error, Exception))  # such as KeyboardInterrupt
        try:
            if errors:
                raise errors[0]
        finally:
            errors.clear()

    def _items(self) -> Iterator[object]:
        with contextlib.suppress(IndexError):  # no item is left
            while True:
                yield self._left.popleft()


class _Pool:
    """Threads of this process in each of which PyTorch's own operations use one thread."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()  # None ends a thread
        self.workers: list[_Worker] = []
        self._growing = threading.Lock()

    def grown(self, threads: int) -> "_Pool | None":
        """This pool, grown to ``threads`` threads or as many as can start; None if none can."""
        with self._growing:
            self.workers = [worker for worker in self.workers if worker.is_alive()]
            if len(self.workers) < threads:
                with _same_threads():
                    self._start(threads - len(self.workers))
            return self if self.workers else None

    def close(self) -> None:
        """End the threads: if a thread leaves PyTorch while Python ends, the process aborts."""
        for _ in self.workers:
            self.jobs.put(None)
        for worker in self.workers:
            worker.join(SECONDS_TO_END)

    def _start(self, count: int) -> None:
        try:
            for _ in range(count):
                worker = _Worker(self.jobs)
                worker.start()
                worker.ready.wait()
                self.workers += [worker] if worker.serves else []
        except (RuntimeError, MemoryError) as error:  # past a limit of threads, processes or memory
            # If a signal interrupts a wait for the thread, Python raises this error of a lock, and
            # only its context is the interruption.
            if error.__context__ is not None:
                raise error.__context__ from None


class _Worker(threading.Thread):
    """Works at jobs, one after the other, until it gets None."""

    def __init__(self, jobs: SimpleQueue) -> None:
        super().__init__(name="for_each", daemon=True)
        self.ready, self.serves = threading.Event(), False
        self._jobs = jobs

    def run(self) -> None:
        try:
            torch.get_num_threads()  # as in ``run_in_team``
            torch.set_num_threads(1)
            self.serves = True
        finally:
            self.ready.set()
        while job := self._jobs.get():
            job.work()
            del job


_POOL = _Pool()
_HAS_SHARED = False  # whether this process, or one it was forked from, has shared items
_IS_FORKED = False


@atexit.register
def _close() -> None:
    global _POOL
    pool, _POOL = _POOL, _Pool()
    pool.close()


def _begin_anew_after_fork() -> None:
    """The child has no threads of the pool, and OpenMP would wait for the parent's threads."""
    global _POOL, _IS_FORKED
    if _HAS_SHARED:
        torch.set_num_threads(1)
    _POOL, _IS_FORKED = _Pool(), True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_anew_after_fork)


@contextlib.contextmanager
def _same_threads() -> Iterator[None]:
    """Restore PyTorch's number of threads: threads that start later take the last value."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    with _same_threads():
        torch.set_num_threads(1)
        yield
