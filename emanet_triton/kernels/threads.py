"""Many pieces of work of small operations, shared among threads of the CPU piece by piece.

PyTorch would share each operation among the threads, which would mostly wait for one another.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def num_threads(device: torch.device) -> int:
    """How many threads ``for_each`` uses at most."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def for_each(
    make_run: Callable[[], Callable], items: Sequence[object], device: torch.device
) -> None:
    """Run every item, on a CPU in as many threads as PyTorch is set to use, each making its own."""
    threads = min(num_threads(device), len(items))

    def run_all(mine: Iterable) -> None:
        with torch.inference_mode():  # a setting of each thread
            run = make_run()
            for item in mine:
                run(item)

    if threads == 1:
        run_all(items)
        return
    pool = _pool(torch.get_num_threads(), os.getpid())
    list(pool.map(run_all, (items[i::threads] for i in range(threads))))


def _use_one_thread() -> None:
    torch.get_num_threads()  # a thread's first call of PyTorch sets its number anew
    torch.set_num_threads(1)


@functools.cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process in each of which PyTorch's own operations use one thread."""
    pool = ThreadPoolExecutor(threads, "for_each", _use_one_thread)
    started = threading.Barrier(threads)
    list(pool.map(lambda _: started.wait(), range(threads)))
    torch.set_num_threads(threads)  # what threads to come start with, and the last call decides
    return pool
