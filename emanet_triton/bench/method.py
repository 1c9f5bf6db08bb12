"""How providers are timed: in turns, after a warm-up, within a budget or to an accuracy."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from emanet_triton.bench.clocks import Timed

FEWEST_ROUNDS = 3


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
            return cls(samples[0], samples[0], samples[0], 1)
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7], len(samples))

    @property
    def spread(self) -> float:
        """(p80 - p20) / p50."""
        return (self.p80 - self.p20) / self.p50

    @property
    def relative_error(self) -> float:
        """The standard error of the median divided by the median.

        Samples are taken as normal: the error is 1.2533 sigma / sqrt(n), and p20 and p80 lie
        1.6832 sigma apart.
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
        seconds: the budget of one case. After it no round begins, except for the first three.
        until: go on after ``rounds`` until the relative error of every median is at most this, or
            the budget is spent.
    """

    device: str = "cpu"
    rounds: int = 15
    seconds: float = 30.0
    until: float | None = None

    def times(
        self,
        timers: Mapping[str, Callable[[], Timed]],
        now: Callable[[], float] = time.perf_counter,
    ) -> dict[str, list[Timed]]:
        """Times of every provider. A round times each once; every second round runs backwards.

        Args:
            timers: name of each provider → times it once. The first call of each is a warm-up.
            now: the clock of the budget.
        """
        times: dict[str, list[Timed]] = {name: [] for name in timers}
        for timer in timers.values():
            timer()
        names, begin, done = list(timers), now(), 0
        while timers and not self._ends(times, done, now() - begin):
            for name in names if done % 2 == 0 else reversed(names):
                times[name].append(timers[name]())
            done += 1
        return times

    def _ends(self, times: dict[str, list[Timed]], done: int, spent: float) -> bool:
        if done < FEWEST_ROUNDS:
            return False
        if spent >= self.seconds:
            return True
        if done < self.rounds or self.until is None:
            return done >= self.rounds
        samples = ([timed.warm for timed in own] for own in times.values())
        return all(Statistics.of(own).relative_error <= self.until for own in samples)
