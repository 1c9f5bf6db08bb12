"""The arithmetic of times: percentiles, ratios, turns, and when to stop."""

import functools
import itertools
import math
import random

import pytest

from emanet_triton.bench.clocks import Timed
from emanet_triton.bench.method import Method, Statistics, ratio


def test_percentiles():
    assert Statistics.of([i / 1e3 for i in range(1, 12)]) == Statistics(0.003, 0.006, 0.009, 11)
    assert Statistics.of([2.0]) == Statistics(2.0, 2.0, 2.0, 1)


def test_spread_and_relative_error():
    statistics = Statistics(9.0, 10.0, 11.0, 25)
    assert statistics.spread == pytest.approx(0.2)
    assert statistics.relative_error == pytest.approx(1.2533 * (2 / 1.6832) / 5 / 10)


def test_the_relative_error_is_that_of_a_median_of_normal_samples():
    generator = random.Random(0)
    samples = [[generator.gauss(100, 5) for _ in range(64)] for _ in range(400)]
    medians = [Statistics.of(s).p50 for s in samples]
    mean = sum(medians) / len(medians)
    deviation = math.sqrt(sum((m - mean) ** 2 for m in medians) / len(medians)) / mean
    estimates = [Statistics.of(s).relative_error for s in samples]
    assert sum(estimates) / len(estimates) == pytest.approx(deviation, rel=0.15)


def test_ratios_are_taken_round_by_round():
    times = [1.0, 2.0, 4.0]
    assert ratio([3.0, 6.0, 12.0], times) == Statistics(3.0, 3.0, 3.0, 3)
    assert ratio([2.0, 6.0, 16.0], times).p50 == 3.0


def take_turns(method, seconds, *now):
    """The order of the providers a and b, and their warm times, which are ``seconds`` in turn."""
    order, given = [], iter(seconds)

    def timer(name):
        order.append(name)
        return Timed(next(given), 7.0)

    timers = {name: functools.partial(timer, name) for name in "ab"}
    times = method.times(timers, *now)
    assert all(timed.cold == 7.0 for own in times.values() for timed in own)
    return "".join(order), {name: [timed.warm for timed in own] for name, own in times.items()}


def test_providers_take_turns():
    order, times = take_turns(Method(rounds=3), itertools.count())
    assert order == "ab" + "ab" + "ba" + "ab"  # the first round warms up
    assert times == {"a": [2, 5, 6], "b": [3, 4, 7]}


def test_a_spent_budget_ends_the_rounds_after_three():
    begin = iter([0.0, *itertools.repeat(100.0, 50)])
    _, times = take_turns(Method(rounds=20, seconds=10), itertools.repeat(1.0), lambda: next(begin))
    assert len(times["a"]) == len(times["b"]) == 3


def test_rounds_go_on_until_every_median_is_known_well():
    generator = random.Random(0)
    ticks = iter(lambda: generator.uniform(1.0, 1.2), None)
    method = Method(rounds=3, seconds=1e9, until=0.01)
    _, times = take_turns(method, ticks, lambda: 0.0)
    errors = [
        [Statistics.of(t[:-k] if k else t).relative_error for t in times.values()] for k in (0, 1)
    ]
    assert max(errors[0]) <= 0.01 < max(errors[1])
    assert len(times["a"]) > 10


def test_repetition_ends_with_the_budget():
    now = itertools.count()
    method = Method(rounds=3, seconds=9, until=1e-9)
    _, times = take_turns(method, itertools.cycle([1.0, 2.0, 3.0]), lambda: next(now))
    assert len(times["a"]) == 8


def test_nothing_to_time():
    assert Method().times({}) == {}
