"""Jobs in several processes at once. The loss of one process does not end the others."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from emanet_triton.bench.measure import Lost
from emanet_triton.bench.worker import Workers, no_rows

T = TypeVar("T")


def run_lanes(
    lanes: Sequence[Iterable[functools.partial[T]]],
    processes: int,
    silence: float,
    done: Callable[[functools.partial[T], T | Lost], None],
) -> None:
    """Run the jobs of each lane one after the other, in a process of the lane's own.

    Args:
        lanes: their jobs, which take a ``Watch``. If a job's process is lost, the next job of the
            lane gets a new process. Lanes may share an iterator of a list: each takes its next job.
        processes: how many lanes run at once.
        silence: seconds without a sign of life after which a process is given up.
        done: gets each job and its result, or the ``Lost``; one call at a time.

    Raises:
        Exception: the first error outside a job, such as an error of ``done``. It ends its lane;
            the other lanes go on to their ends.
    """
    waiting, lock, stopped = iter(lanes), threading.Lock(), threading.Event()
    active: set[Workers] = set()
    errors: list[Exception] = []

    def serve() -> None:
        # The processes inherit it: Ctrl-C is for this process, which ends them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for lane in waiting:  # the next of a list iterator: one step for all threads
            try:
                run_lane(lane)
            except Exception as error:
                errors.append(error)

    def run_lane(lane: Iterable[functools.partial[T]]) -> None:
        with contextlib.closing(Workers(silence)) as workers:
            active.add(workers)
            for job in lane:
                if stopped.is_set():
                    return
                result = _result(workers, job)
                with lock:
                    if stopped.is_set():
                        return
                    done(job, result)
            active.remove(workers)

    resource_tracker.ensure_running()  # when a thread starts it, that thread unblocks signals
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(processes)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
        for workers in list(active):
            workers.close()
    if errors:
        raise errors[0]


def _result(workers: Workers, job: functools.partial[T]) -> Any:
    try:
        return workers.run(job, no_rows)
    except Lost as lost:
        return lost
