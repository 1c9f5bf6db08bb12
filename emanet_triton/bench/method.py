"""How calls are timed: in turns, after a warm-up, until a budget or an accuracy is reached."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]  # runs a provider once; returns what the gate looks at
Clock = Callable[[Call], float]  # seconds that one call takes

FEWEST_ROUNDS = 3
FLUSHED_BYTES = 256 * 2**20  # several times any GPU's L2 cache


@dataclass(frozen=True)
class Statistics:
    """The 20th, 50th and 80th percentile of some samples, and how many there are."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Statistics":
        if len(samples) == 1:
            return cls(*samples * 3, 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7], len(samples))

    @property
    def spread(self) -> float:
        """(p80 - p20) / p50."""
        return (self.p80 - self.p20) / self.p50

    @property
    def relative_error(self) -> float:
        """The standard error of the median over the median.

        That of normal samples, 1.2533 sigma / sqrt(n), with sigma from the two percentiles,
        which lie 1.6832 sigma apart.
        """
        return 1.2533 / 1.6832 * self.spread / math.sqrt(self.rounds)


def ratio(baseline: Sequence[float], times: Sequence[float]) -> Statistics:
    """How many times faster than the baseline, round by round."""
    return Statistics.of([b / t for b, t in zip(baseline, times, strict=True)])


@dataclass(frozen=True)
class Method:
    """When timing ends.

    Attributes:
        device: "cpu" or "cuda".
        rounds: how often every provider is timed.
        seconds: budget of one case; past it no round begins, but three are always made.
        until: with it rounds go on past ``rounds``, until the relative error of every median is
            at most this, or the budget is spent.
    """

    device: str = "cpu"
    rounds: int = 15
    seconds: float = 30.0
    until: float | None = None

    def times(self, calls: dict[str, Call], wall: bool = False) -> dict[str, list[float]]:
        """Seconds of every call, one of each a round, in an order that turns round.

        Args:
            calls: by name; each is run once untimed before the first round.
            wall: on a GPU, wall clock until the device is idle in place of the device's own.
        """
        return self.alternate(calls, clock(self.device, wall))

    def alternate(
        self,
        calls: dict[str, Call],
        clock: Clock,
        now: Callable[[], float] = time.perf_counter,
    ) -> dict[str, list[float]]:
        """As ``times``, by a given clock."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        begin, done = now(), 0
        while calls and not self._ends(times, done, now() - begin):
            for name in calls if done % 2 == 0 else reversed(calls):
                times[name].append(clock(calls[name]))
            done += 1
        return times

    def _ends(self, times: dict[str, list[float]], done: int, spent: float) -> bool:
        if done < FEWEST_ROUNDS:
            return False
        if spent >= self.seconds:
            return True
        if done < self.rounds or self.until is None:
            return done >= self.rounds
        return all(Statistics.of(t).relative_error <= self.until for t in times.values())


def clock(device: str, wall: bool = False) -> Clock:
    """Of a device: wall clock on the CPU; on a GPU events, behind a flush of its L2 cache."""
    if device == "cpu":
        return wall_clock
    if wall:
        return _synchronised_clock
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    return lambda call: _event_clock(call, flushed)


def wall_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _synchronised_clock(call: Call) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _event_clock(call: Call, flushed: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


class Replay:
    """A call as the replay of a CUDA graph, which allocates nothing of its own."""

    def __init__(self, call: Call) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = call()

    def __call__(self) -> object:
        self._graph.replay()
        return self._result
