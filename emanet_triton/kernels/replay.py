"""Record a call as a CUDA graph and time its replays, without the time of Python and launches."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from emanet_triton.kernels.device import current_device

T = TypeVar("T")

FLUSHES = 4  # before a cold replay, memory of so many times the L2 cache is written
WARM_SECONDS = 1e-3  # about the time of all replays of one warm round
MOST_REPLAYS = 100

_ONE_AT_A_TIME = threading.RLock()  # PyTorch records one graph at a time in a process


def record(
    call: Callable[[], T], device: torch.device, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, T]:
    """Record the launches of ``call``, which has run before.

    Other threads may use the device meanwhile. If recording fails, the earlier stream is current
    again, and allocations and random numbers work as before.

    Args:
        call: launches kernels on ``device`` without waiting for them. The tensors that they read
            must stay as long as the graph.
        device: a GPU. It need not be the current one.
        pool: memory to share with other graphs, from ``torch.cuda.graph_pool_handle``.

    Returns:
        The graph, and the result of ``call``, which every replay writes anew.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    with _ONE_AT_A_TIME, current_device(device):
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # PyTorch's own stream for recordings is on the device where it recorded first.
        stream = _recording_stream(torch.cuda.current_device())
        try:
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = call()
        except BaseException:
            _leave(pool, before)
            raise
    return graph, result


@functools.cache  # since cuBLAS keeps memory for each stream
def _recording_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _leave(pool: Any, stream: torch.cuda.Stream) -> None:
    """Clean up after a recording that failed.

    If CUDA raises at the end of a recording, PyTorch 2.11 keeps its own stream current, and its
    allocator and its random number generator behave as if the recording went on.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the recording has ended properly
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    torch.cuda.set_stream(stream)
    with contextlib.suppress(RuntimeError, IndexError):
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())


class Replay(Generic[T]):
    """A call as a CUDA graph, whose replays allocate no memory.

    Args:
        call: launches kernels on the current device without waiting for them. It is run once
            before it is recorded, so that kernels are compiled and algorithms chosen.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        device = torch.device("cuda", torch.cuda.current_device())
        self._graph, self._result = record(call, device)
        self._call = call  # holds the tensors that the graph reads

    def __call__(self) -> T:
        """Replay the call; returns its result, which the next replay overwrites."""
        self._graph.replay()
        return self._result


def seconds_on_device(run: Callable[[], object], *, rounds: int, cold: bool) -> list[float]:
    """Measure ``rounds`` times how many seconds the device takes for ``run``.

    Args:
        run: a ``Replay``. If it is another call, the gaps between its launches count, too.
        rounds: how many times to measure.
        cold: overwrite the L2 cache before every run; the overwriting is not timed. Otherwise a
            time is the mean of several runs in a row, and the cache holds data of the run before.
    """
    flush = _flush() if cold else None
    times = 1 if cold else _replays(run)
    return [_timed(run, times, flush or run) / times for _ in range(rounds)]


def _replays(run: Callable[[], object]) -> int:
    once = _timed(run, 1, run)
    return max(1, min(MOST_REPLAYS, round(WARM_SECONDS / max(once, 1e-9))))


def _timed(run: Callable[[], object], times: int, before: Callable[[], object]) -> float:
    """Seconds between events around the runs, which are launched while ``before`` still runs."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _flush() -> Callable[[], object]:
    """Make a function that overwrites the L2 cache of the current device."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    written = torch.empty(FLUSHES * cache, dtype=torch.uint8, device="cuda")
    return written.zero_
