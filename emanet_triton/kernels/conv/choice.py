"""Which backend computes a convolution on a GPU: measured once, at the first call of a shape.

The winner is kept in ``$XDG_CACHE_HOME/emanet_triton/conv_choice.jsonl``, by device, versions and
the sources of the kernels. ``EMANET_TRITON_CONV_SEARCH=0`` switches the search off: then the
first candidate computes everything, on an NVIDIA GPU cuDNN.
"""

import functools
import os
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from emanet_triton.errors import first_line
from emanet_triton.kernels.cache import Cache, digest, environment
from emanet_triton.kernels.conv.exact import Check
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_out_of_memory
from emanet_triton.kernels.replay import record, seconds_on_device

ROUNDS = 5  # of about a millisecond each, whose median counts
GAIN = 0.02  # by which a candidate must be faster than those before it: less is noise
GAINS = {"cudnn-benchmark": 0.05}  # of one that has to be paid for: its search in every process

Candidates = Mapping[str, Callable[[], Tensor]]

_HOPELESS: set[tuple[torch.device, str]] = set()  # for which no candidate was left


def choose(
    key: str,
    device: torch.device,
    candidates: Candidates,
    last_resort: str,
    make_check: Callable[[], Check],
) -> str:
    """The backend for a convolution on a CUDA device.

    Args:
        key: all that decides the time of the convolution on one device.
        device: where it runs.
        candidates: {backend: call that computes the convolution}, the default first.
        last_resort: one of them, for where all fail: this process then goes on with it. On disk
            nothing is kept then, nor where memory runs out; nothing is measured while a CUDA
            graph is recorded.
        make_check: what measures the error of its outputs.
    """
    default, cache = next(iter(candidates)), _cache(device)
    if cache is None:
        return default
    known = cache.get(key)
    if known in candidates:
        return known
    if (device, key) in _HOPELESS:
        return last_resort
    if torch.cuda.is_current_stream_capturing():
        return default
    watch = MemoryWatch(device)
    try:
        with torch.cuda.device(device):
            winner = fastest(key, make_check(), candidates)
    except Exception as error:
        if not watch.explains(error):
            raise
        warnings.warn(
            f"no memory to measure {key}; {default} is used: {first_line(error)}", stacklevel=2
        )
        return default
    if winner is None:
        _HOPELESS.add((device, key))
        warnings.warn(f"no backend is left for {key}; {last_resort} is used", stacklevel=2)
        return last_resort
    cache.put(key, winner)
    return winner


def fastest(key: str, check: Check, candidates: Candidates) -> str | None:
    """The candidate of the least time among those that run and are as exact as they should be.

    Of about equal ones it is the first. One that does not run or is not as exact is left out with
    a warning. Arguments as in ``choose``.

    Raises:
        RuntimeError: memory ran out.
    """
    watch, times = MemoryWatch(check.x.device), {}
    try:
        allowed = check.allowed()
    except Exception as error:
        if watch.explains(error):
            raise
        warnings.warn(f"{key} cannot be checked: {first_line(error)}", stacklevel=3)
        return None
    for name, run in candidates.items():
        try:
            check.poison()
            error = check.error(run())
            if not error <= allowed:
                raise ValueError(f"its error is {error:.3g}, where {allowed:.3g} is allowed")
            times[name] = _seconds(name, key, run)
        except Exception as error:  # whatever a compiler or a driver may raise
            if watch.explains(error):
                raise
            warnings.warn(
                f"backend {name} is left out for {key}: {first_line(error)}", stacklevel=3
            )
    winner = None
    for name, seconds in times.items():
        if winner is None or seconds < (1 - GAINS.get(name, GAIN)) * times[winner]:
            winner = name
    return winner


def _seconds(name: str, key: str, run: Callable[[], Tensor]) -> float:
    """Median seconds of a replay, as the network's launches are replayed.

    The L2 cache stays warm: in the network, too, the layer before has just written the input.
    """
    try:
        graph, _ = record(run)
    except Exception as error:  # whatever the driver raises for a launch that cannot be recorded
        if is_out_of_memory(error):
            raise
        warnings.warn(
            f"backend {name} is timed launch by launch for {key}, as it cannot be recorded: "
            f"{first_line(error)}",
            stacklevel=2,
        )
    else:
        run = graph.replay
    return statistics.median(seconds_on_device(run, rounds=ROUNDS, cold=False))


@functools.cache
def _cache(device: torch.device) -> Cache | None:
    """Earlier winners on a device; None where the search is switched off."""
    if os.environ.get("EMANET_TRITON_CONV_SEARCH") == "0":
        return None
    folder = Path(__file__).parent
    kernels = digest([*folder.glob("*.py"), folder.parent / "tile.py"])
    return Cache("conv_choice.jsonl", f"{environment(device)}, kernels {kernels}")
