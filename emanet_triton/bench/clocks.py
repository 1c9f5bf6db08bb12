"""How a call is timed: by wall clock; on a GPU as the replay of its CUDA graph, or by events.

Python may need longer to launch one of our operators than the GPU to run it. The replay of a graph
leaves the time of Python out, for every provider alike.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels.replay import Replay, seconds_on_device

Call = Callable[[], Any]  # runs a provider once and returns its result

HOST_CALLS = 5  # the host's time is their median
# PyTorch's threads wait for work for 3 to 5 ms after a call and take the cores meanwhile.
SPIN_SECONDS = 0.01


class Timed(NamedTuple):
    """Seconds of one call with a warm and, on a GPU, with a cold L2 cache."""

    warm: float
    cold: float | None = None


@dataclass(frozen=True)
class Timer:
    """Times a call once whenever it is called.

    Attributes:
        clock: ``"graph"``, ``"events"`` or ``"wall"``, as in ``Row.clock``.
        run: the call, or the replay of its graph. Either returns the call's result.
        time: times ``run``.
    """

    clock: str
    run: Call
    time: Callable[[Call], Timed]

    def __call__(self) -> Timed:
        return self.time(self.run)


def wall_timer(call: Call, own_threads: bool = False) -> Timer:
    """Wall clock, for a call that uses no device or leaves it idle.

    Args:
        call: what to time.
        own_threads: whether the call has threads that are not PyTorch's. Before it is timed,
            PyTorch's threads come to rest.
    """
    return Timer("wall", call, _rested_seconds if own_threads else _wall_seconds)


def synchronised_timer(call: Call) -> Timer:
    """Wall clock until the GPU is idle."""
    return Timer("wall", call, _synchronised_seconds)


def events_timer(call: Call) -> Timer:
    """The GPU's time from the first to the last launch of a call, with the gaps between them."""
    return Timer("events", call, _device_seconds)


def graph_timer(call: Call) -> Timer:
    """The GPU's time of a replay, or of the launches if the call cannot be captured.

    Raises:
        Exception: the attempt to capture it broke the CUDA context.
    """
    try:
        return Timer("graph", Replay(call), _device_seconds)
    except Exception:  # of any type, such as from a call that waits for the device
        torch.cuda.synchronize()  # raises if the context is broken: then no other clock works
        return events_timer(call)


def host_seconds(call: Call) -> float:
    """Median time until a call returns. The GPU is idle before, and may still work after."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        times.append(_wall_seconds(call).warm)
    torch.cuda.synchronize()
    return statistics.median(times)


def poison(result: object, device: str) -> None:
    """Fill the tensors of a result that lie on a device, with NaN or the largest integer."""
    if isinstance(result, tuple | list):
        for part in result:
            poison(part, device)
    elif isinstance(result, Tensor) and result.device.type == device:
        is_float = result.is_floating_point()
        with torch.inference_mode():
            result.fill_(float("nan") if is_float else torch.iinfo(result.dtype).max)


def _wall_seconds(call: Call) -> Timed:
    start = time.perf_counter()
    call()
    return Timed(time.perf_counter() - start)


def _rested_seconds(call: Call) -> Timed:
    time.sleep(SPIN_SECONDS)
    return _wall_seconds(call)


def _synchronised_seconds(call: Call) -> Timed:
    def and_wait() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _wall_seconds(and_wait)


def _device_seconds(call: Call) -> Timed:
    return Timed(*(seconds_on_device(call, rounds=1, cold=cold)[0] for cold in (False, True)))
