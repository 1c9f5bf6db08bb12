"""Choose the backend of an operator by measuring: on a GPU at the first call of a shape.

On a CPU whose fastest convolutions are not known, ``fuse`` measures (see ``conv.cpu_choice``).
``$XDG_CACHE_HOME/emanet_triton/conv_choice.jsonl``, or ``em_choice.jsonl``, keeps the winner with
the device, the versions and a digest of the kernels' sources. ``EMANET_TRITON_CONV_SEARCH=0``
switches every search off: then the first candidate runs. On an NVIDIA GPU the first candidate of a
convolution is cuDNN's fused one, or PyTorch's if cuDNN cannot fuse.
"""

import contextlib
import functools
import math
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from emanet_triton.errors import first_line
from emanet_triton.kernels.cache import Cache, digest, environment
from emanet_triton.kernels.device import current_device, is_capturing
from emanet_triton.kernels.exact import Check
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_out_of_memory
from emanet_triton.kernels.replay import record, seconds_on_device

ROUNDS = 5  # each takes about a millisecond; the median of their times counts
CPU_ROUNDS = 3
GAIN = 0.02  # a later candidate must be faster by this share; smaller differences are noise
MOST_NOT_FINITE = 3  # one damaged image is no reason to give up; a layer that overflows is one
GAINS = {"cudnn-benchmark": 0.05}  # larger, because cuDNN searches anew in every process

Candidates = Mapping[str, Callable[[], Tensor | tuple[Tensor, ...]]]
MakeChecks = Callable[[], Sequence[Check]]


class NotFiniteError(ValueError):
    """An operator's outputs are not finite, so no backend can be compared with another."""


_HOPELESS: set[tuple[torch.device, str]] = set()  # keys for which all candidates failed
_NOT_FINITE: Counter[tuple[torch.device, str]] = Counter()  # searches that NaN or infinity ended
_MAY_MEASURE: ContextVar[bool] = ContextVar("_MAY_MEASURE", default=True)


@contextlib.contextmanager
def without_measuring() -> Iterator[None]:
    """In this context ``choose`` takes earlier winners, or else the first candidate."""
    token = _MAY_MEASURE.set(False)
    try:
        yield
    finally:
        _MAY_MEASURE.reset(token)


def choose(
    key: str,
    device: torch.device,
    candidates: Candidates,
    last_resort: str,
    make_checks: MakeChecks | None = None,
    package: str = "conv",
) -> str:
    """Choose the backend of an operator.

    Args:
        key: what the choice is made for.
        device: where the operator runs.
        candidates: {backend: call that computes the outputs}, the default first.
        last_resort: the candidate that this process uses if all fail.
        make_checks: makes the objects that measure the error of each output; None if no candidate
            can be wrong on one device only.
        package: the kernels' package; a choice holds as long as its sources are the same.

    Returns:
        One of the candidates. A measured choice is kept on disk. Nothing is kept in
        ``without_measuring``, while a CUDA graph is recorded, if memory runs out, if outputs are
        not finite, or if all candidates fail.
    """
    default, cache = next(iter(candidates)), _cache(device, package)
    if cache is None:
        return default
    known = cache.get(key)
    if known is not None and known in candidates:
        return known
    if (device, key) in _HOPELESS:
        return last_resort
    if not _MAY_MEASURE.get() or _NOT_FINITE[device, key] >= MOST_NOT_FINITE:
        return default
    if is_capturing(device):
        return default
    watch = MemoryWatch(device)
    try:
        with current_device(device):
            winner = fastest(key, device, candidates, make_checks)
    except NotFiniteError as error:
        _NOT_FINITE[device, key] += 1
        if _NOT_FINITE[device, key] == MOST_NOT_FINITE:
            warnings.warn(f"{error}; {default} is used from now on", stacklevel=2)
        return default
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


def known(key: str, device: torch.device, package: str = "conv") -> str | None:
    """An earlier winner on a device; None if there is none, or without a search."""
    cache = _cache(device, package)
    return None if cache is None else cache.get(key)


def reread() -> None:
    """Read earlier winners from disk again, since another process may have added some."""
    _cache.cache_clear()


def fastest(
    key: str,
    device: torch.device,
    candidates: Candidates,
    make_checks: MakeChecks | None = None,
) -> str | None:
    """The fastest candidate that runs and is exact enough; None if there is none.

    If several candidates are about equally fast, the first of them wins. A warning names each
    candidate that does not run or is not exact enough. The arguments are those of ``choose``.

    Raises:
        RuntimeError: memory ran out.
        NotFiniteError: the outputs are not finite.
    """
    watch, times = MemoryWatch(device), {}
    checks: Sequence[Check] = ()
    try:
        if make_checks:
            checks = make_checks()
        allowed = [check.allowed() for check in checks]
    except Exception as error:
        if watch.explains(error):
            raise
        warnings.warn(f"{key} cannot be checked: {first_line(error)}", stacklevel=3)
        return None
    if not all(map(math.isfinite, allowed)):
        raise NotFiniteError(f"{key}: the outputs are not finite, so none can be checked")
    for name, run in candidates.items():
        try:
            if checks:
                _require_exact(run, checks, allowed)
            times[name] = _seconds(name, key, device, run)
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


def _require_exact(
    run: Callable[[], Tensor | tuple[Tensor, ...]],
    checks: Sequence[Check],
    allowed: Sequence[float],
) -> None:
    """Raise ValueError if an output of a candidate has a larger error than is allowed."""
    for check in checks:
        check.poison()
    outputs = run()
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    for check, output, most in zip(checks, outputs, allowed, strict=True):
        found = check.error(output)
        if not found <= most:
            raise ValueError(f"its error is {found:.3g}, where {most:.3g} is allowed")


def _seconds(name: str, key: str, device: torch.device, run: Callable[[], object]) -> float:
    """Seconds of a call. On a GPU the median of replays of a CUDA graph, as in the network.

    The L2 cache stays warm: in the network, too, the layer before has just written the input.
    """
    if device.type == "cpu":
        return _least_seconds(run)
    try:
        graph, _ = record(run, device)
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


def _least_seconds(run: Callable[[], object]) -> float:
    """The least of several times on a CPU, where other processes only add to a time."""
    run()
    times = []
    for _ in range(CPU_ROUNDS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)


def may_search() -> bool:
    """Whether the environment allows any search."""
    return os.environ.get("EMANET_TRITON_CONV_SEARCH") != "0"


@functools.cache
def _cache(device: torch.device, package: str) -> Cache | None:
    """Earlier winners among a package's backends on a device; None without a search."""
    if not may_search():
        return None
    folder = Path(__file__).parent
    kernels = digest([*folder.glob("*.py"), *(folder / package).glob("*.py")])
    return Cache(f"{package}_choice.jsonl", f"{environment(device)}, kernels {kernels}")
