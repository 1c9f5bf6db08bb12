"""Jobs in several processes at once, each of which may be lost without the others."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import resource_tracker

from emanet_triton.bench.measure import Lost
from emanet_triton.bench.worker import Work, Workers, no_rows

Done = Callable[[Work, object], None]


def run_lanes(lanes: Sequence[Iterable[Work]], processes: int, silence: float, done: Done) -> None:
    """Run the jobs of every lane one after the other, in a process of the lane's own.

    Args:
        lanes: their jobs. A job whose process is lost is over; the next one gets a new process.
            Several lanes may share one list iterator: each takes the next job of it.
        processes: lanes at once.
        silence: seconds without a sign of life after which a process is given up.
        done: gets every job and its result, or the ``Lost``; one call at a time.

    Raises:
        Exception: the first one outside a job, such as one of ``done``. It ends its lane; the
            other lanes are run to their ends.
    """
    waiting, lock, stopped = iter(lanes), threading.Lock(), threading.Event()
    active: set[Workers] = set()
    errors: list[Exception] = []

    def serve() -> None:
        # Inherited by the processes: Ctrl-C is for this one, which ends them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for lane in waiting:  # the next of a list iterator: one step for all threads
            try:
                run_lane(lane)
            except Exception as error:
                errors.append(error)

    def run_lane(lane: Iterable[Work]) -> None:
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


def _result(workers: Workers, job: Work) -> object:
    try:
        return workers.run(job, no_rows)
    except Lost as lost:
        return lost
