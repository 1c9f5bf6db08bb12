"""The clocks of a call: wall time; on a GPU the replay of its CUDA graph, or its launches.

Python takes 70 to 800 microseconds to launch one of our operators, which take the device 10 to
200. The replay of a graph leaves that time out, for every provider alike.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels.replay import Replay, seconds_on_device

Call = Callable[[], object]  # runs a provider once; returns what the gate looks at

HOST_CALLS = 5  # of which the median is the host's time


class Timed(NamedTuple):
    """Seconds of one call with a warm and, on a GPU, with a cold L2 cache."""

    warm: float
    cold: float | None = None


@dataclass(frozen=True)
class Timer:
    """Times a call whenever it is called.

    Attributes:
        clock: ``"graph"``, ``"events"`` or ``"wall"``, as ``Row.clock`` has it.
        run: what is timed: the call, or the replay of its graph; returns the call's result.
        time: how.
    """

    clock: str
    run: Call
    time: Callable[[Call], Timed]

    def __call__(self) -> Timed:
        return self.time(self.run)


def wall_timer(call: Call) -> Timer:
    """Wall clock, of a call after which the device is idle or that needs none."""
    return Timer("wall", call, _wall_seconds)


def synchronised_timer(call: Call) -> Timer:
    """Wall clock until the GPU is idle."""
    return Timer("wall", call, _synchronised_seconds)


def events_timer(call: Call) -> Timer:
    """The GPU's time from the first to the last launch of a call, gaps between them included."""
    return Timer("events", call, _device_seconds)


def graph_timer(call: Call) -> Timer:
    """The GPU's time of a replay; of the launches where the call cannot be captured.

    Raises:
        Exception: the attempt broke the CUDA context.
    """
    try:
        return Timer("graph", Replay(call), _device_seconds)
    except Exception:  # of any type: such as from a call that waits for the device
        torch.cuda.synchronize()  # raises if the context is broken: then no other clock works
        return events_timer(call)


def host_seconds(call: Call) -> float:
    """Median time until a call returns on an idle GPU, whether that is done or not."""
    times = []
    for _ in range(HOST_CALLS):
        torch.cuda.synchronize()
        times.append(_wall_seconds(call).warm)
    torch.cuda.synchronize()
    return statistics.median(times)


def poison(result: object, device: str) -> None:
    """Fill the tensors of a result that lie on a device: NaN, or the dtype's largest integer."""
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


def _synchronised_seconds(call: Call) -> Timed:
    def and_wait() -> None:
        call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _wall_seconds(and_wait)


def _device_seconds(call: Call) -> Timed:
    return Timed(*(seconds_on_device(call, rounds=1, cold=cold)[0] for cold in (False, True)))
