"""Each combination of options and traits has a tape of its own, where there may be tapes."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
from tape_cases import KERNEL, Operator, pair, summed

from emanet_triton.kernels import relaunch, tape

pytestmark = pytest.mark.usefixtures("tapes")


OTHERS = {
    "shape": lambda x, y: (x[:2], y[:2]),
    "strides": lambda x, y: (x.T.contiguous().T, y.T.contiguous().T),
    "option": lambda x, y: (x, y, 2.0),
    "address of a number": lambda x, y: (torch.rand(13)[1:].view(3, 4), y),
    "address of two numbers": lambda x, y: (torch.rand(14)[2:].view(3, 4), y),
    "dtype": lambda x, y: (x.view(torch.int32), y),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_traits_have_another_tape(other):
    operator = Operator(lambda x, y, factor=1.0: summed(x, y, factor))
    for _ in range(3):
        operator.taped(*pair(3, 4))
    assert operator.calls == 2
    for _ in range(3):
        operator.taped(*other(*pair(3, 4)))
    assert operator.calls == 4
    operator.taped(*pair(3, 4))
    assert operator.calls == 4


@pytest.mark.parametrize("knob", ["debug", "instrumentation_mode"])
def test_other_settings_of_triton_have_another_tape(knob, monkeypatch):
    operator = Operator(summed)
    for _ in range(3):
        operator.taped(*pair(4))
    knobs = triton.knobs.runtime if knob == "debug" else triton.knobs.compilation
    monkeypatch.setattr(knobs, knob, "other")
    operator.taped(*pair(4))
    assert operator.calls == 3


def test_a_smaller_tile_makes_tapes_anew(monkeypatch):
    operator = Operator(summed)
    for _ in range(3):
        operator.taped(*pair(4))
    monkeypatch.setattr(tape, "replacements", lambda: 1)
    for _ in range(3):
        operator.check(*pair(4))
    assert operator.calls == 4


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize("others", [1, 2])
def test_sequences_of_tensors_and_options(others, sequence):
    operator = Operator(lambda x, ys, factors: summed(x, ys[-1], factors[0]))
    for n in (others, others, others, 3, others):
        several = sequence(torch.rand(4) for _ in range(n))
        operator.check(torch.rand(4), several, sequence([0.5, 1.5]))
    assert operator.calls == 3
    operator.check(torch.rand(4), several, sequence([0.25, 1.5]))
    assert operator.calls == 4


def test_tensors_in_another_sequence_have_another_tape():
    operator = Operator(lambda xs, ys: summed(xs[-1], ys[-1]))
    a, b, c = torch.rand(3, 4)
    for xs, ys in [([a], [b, c])] * 3 + [([a, b], [c])] * 3:
        operator.check(xs, ys)
    assert operator.calls == 4


def test_whoever_watches_sees_the_operator(monkeypatch):
    operator = Operator(summed)
    for _ in range(3):
        operator.taped(*pair(4))
    with monkeypatch.context() as patch:
        patch.setattr(relaunch, "is_watched", lambda: True)
        operator.check(*pair(4))
    assert operator.calls == 3
    monkeypatch.setattr(KERNEL, "pre_run_hooks", ["hook"])
    operator.check(*pair(4))
    assert operator.calls == 4
    monkeypatch.setattr(KERNEL, "pre_run_hooks", [])
    operator.check(*pair(4))
    assert operator.calls == 4


def test_without_the_fast_way_there_is_no_tape(monkeypatch):
    monkeypatch.setattr(relaunch, "has_fast_way", lambda device: False)
    operator = Operator(summed)
    for _ in range(3):
        operator.check(*pair(4))
    assert operator.calls == 3


class Own(torch.Tensor):
    pass


def test_tensors_of_other_classes_run_as_usual():
    operator = Operator(summed)
    x, y = pair(4)
    for _ in range(3):
        operator.taped(x.as_subclass(Own), y)
    assert operator.calls == 3
    for _ in range(3):
        operator.check(torch.nn.Parameter(x, requires_grad=False), y)
    assert operator.calls == 5


def test_keywords():
    operator = Operator(summed)
    for _ in range(3):
        operator.check(*pair(4), factor=2.0)
    assert operator.calls == 2
    for _ in range(3):
        x, y = pair(4)
        operator.check(x, y=y, factor=2.0)
    assert operator.calls == 4
    operator.check(x, y, 2.0)
    assert operator.calls == 5


def test_options_that_cannot_be_hashed():
    operator = Operator(lambda x, y, factors: summed(x, y, float(factors[0])))
    for _ in range(3):
        operator.check(*pair(4), np.ones(2))
    assert operator.calls == 3


def test_the_device_is_a_trait():
    here, there = (torch.empty(4, device=device) for device in ("cpu", "meta"))
    assert tape._traits((here, there))[0] != tape._traits((here, torch.empty(4)))[0]


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("sequence", [lambda *tensors: [tensors], Pair])
def test_other_sequences_run_as_usual(sequence):
    """A tape's key would hold their tensors."""

    def operate(xs):
        x, y = xs if len(xs) == 2 else xs[0]
        return summed(x, y)

    operator = Operator(operate)
    for _ in range(3):
        operator.check(sequence(*pair(4)))
    assert operator.calls == 3


def test_equal_options_of_other_types_have_another_tape():
    operator = Operator(summed)
    for factor in (1.0, 1.0, 1.0, 1, 1, 1):
        operator.check(*pair(4), factor)
    assert operator.calls == 4


def test_old_tapes_are_forgotten(monkeypatch):
    monkeypatch.setattr(tape, "MOST_TAPES", 2)
    operator = Operator(summed)
    for n in (1, 1, 2, 2, 1, 2):
        operator.check(*pair(n))
    assert operator.calls == 4
    operator.check(*pair(3))
    operator.check(*pair(1))
    assert operator.calls == 6
