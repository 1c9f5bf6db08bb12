"""The tests of kernels get poisoned memory: an element that no kernel writes shows."""

import pytest
import torch
from conv_reference import make
from device import DEVICE
from em_cases import common_case
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from emanet_triton.kernels.conv.op import conv_bias_act, expand_reduce
from emanet_triton.kernels.em.op import em_attention, em_attention_block
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.kernels.resample.op import Taps, resample_labels, resample_probabilities


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    """A launch does nothing."""
    for launches in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(launches, "run", lambda *_, **__: None)


def convolution():
    return conv_bias_act(*make((1, 8, 5, 5), 4, 3).operands, backend="triton")


def pair(output):
    step = make((1, 64, 3, 3), 64, 1)
    operands = step.x, [step.weight] * 2, [step.bias] * 2, step.x
    return expand_reduce(*operands, backend="triton")[output]


def expanded():
    return pair(0)


def reduced():
    return pair(1)


def attention():
    case = common_case()
    arguments = case.feats(torch.float32), case.initial_bases(torch.float32)
    return em_attention(*arguments, backend="triton")[0]


def block():
    case = common_case()
    inputs = (case.feats, case.initial_bases)
    arguments = (*(f(torch.float32) for f in inputs), *case.weights(torch.float32))
    return em_attention_block(*arguments, backend="triton")[0]


def pooling():
    return max_pool(torch.ones(1, 8, 5, 5, device=DEVICE), backend="triton")


def resampling():
    taps = Taps(
        torch.zeros(1, 1, 9, dtype=torch.int32, device=DEVICE), torch.ones(1, 1, 9, device=DEVICE)
    )
    return torch.ones(1, 19, 4, device=DEVICE), taps, taps


def probabilities():
    return resample_probabilities(*resampling(), backend="triton")[1]


OUTPUTS = [convolution, expanded, reduced, pooling, attention, block, probabilities]


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.__name__)
def test_values_are_nan(output):
    assert output().isnan().all()


def test_labels_are_255():
    assert (resample_labels(*resampling(), backend="triton") == 255).all()
