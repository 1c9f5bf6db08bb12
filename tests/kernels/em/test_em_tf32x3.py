"""The default products of float32: each operand is the sum of two TF32 numbers."""

import inspect

import pytest
import torch
from em_cases import Case, assert_as_exact, channels_first, eager_block, eager_em_attention
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.bench.gpu_check.tf32 import PRODUCTS, cut
from emanet_triton.kernels.em import op, reference

CASES = (
    Case(1, 512, (20, 50), 64, "first"),
    Case(2, 64, (9, 37), 7, "first"),
    Case(1, 512, (3, 43), 64, "first", stages=1),
)


class SplitOperands(TorchDispatchMode):
    """Products of float32 as Triton's tf32x3 computes them, all but the product of the rests."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        positions = PRODUCTS.get(function)
        if positions is None:
            return function(*args, **(kwargs or {}))
        assert function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        first, second = args
        high, other_high = cut(first), cut(second)
        rest, other_rest = cut(first - high), cut(second - other_high)
        small = function(rest, other_high) + function(high, other_rest)
        return small + function(high, other_high)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_errors_stay_within_twice_those_of_float32(case, scale):
    x, mu = channels_first(case.feats(torch.float32, scale).relu().cpu()), case.initial_bases
    mu, weights = mu(torch.float32).cpu(), [w.cpu() for w in case.weights(torch.float32)]
    doubles = x.double(), mu.double()
    exact = (
        *reference.em_attention(*doubles, case.stages),
        *reference.em_attention_block(*doubles, *(w.double() for w in weights), case.stages),
    )
    found = []
    for mode in (torch.no_grad(), SplitOperands()):
        with mode:
            plain = eager_em_attention(x, mu, case.stages)
            found.append((*plain, *eager_block(x, mu, weights, case.stages)))
    for plain, split, right in zip(*found, exact, strict=True):
        assert not torch.equal(plain, split)
        assert_as_exact(split, plain, right)


@pytest.mark.parametrize("operator", [op.em_attention, op.em_attention_block])
def test_they_are_the_default(operator):
    assert inspect.signature(operator).parameters["precision"].default == "tf32x3"
