"""Jobs in several processes at once. The loss of one process does not end the others."""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from emanet_triton.bench.measure import Lost
from emanet_triton.bench.worker import Worker

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
    lock, stopped = threading.Lock(), threading.Event()
    active: set[Worker] = set()

    def run_lane(lane: Iterable[functools.partial[T]]) -> None:
        with contextlib.closing(Worker(silence)) as worker:
            active.add(worker)
            for job in lane:
                if stopped.is_set():
                    return
                result = _result(worker, job)
                with lock:
                    if stopped.is_set():
                        return
                    done(job, result)
            active.remove(worker)

    resource_tracker.ensure_running()  # when a thread starts it, that thread unblocks signals
    # The processes inherit it: Ctrl-C is for this process, which ends them.
    blocked = signal.SIG_BLOCK, {signal.SIGINT}
    with ThreadPoolExecutor(processes, "", signal.pthread_sigmask, blocked) as pool:
        try:
            lanes_run = [pool.submit(run_lane, lane) for lane in lanes]
            wait(lanes_run)
        finally:
            stopped.set()
            for worker in list(active):
                worker.close()
    for lane_run in lanes_run:
        lane_run.result()


def _result(worker: Worker, job: functools.partial[T]) -> Any:
    try:
        return worker.run(job)
    except Lost as lost:
        return lost
