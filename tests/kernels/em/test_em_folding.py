"""The block's small products against float64, one kernel at a time.

A wrong ``size`` would change no output of the block: the folded bases are divided by it, and the E
step takes this back.
"""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from device import DEVICE

from emanet_triton.kernels.em import block, tiles

BATCH, BASES = 2, 21  # 42 rows: the last block of 16 has some too many
BOUND = 5e-6  # relative to the largest value; float32 sums of a hundred products


@dataclass(frozen=True)
class Case:
    """The inputs of the products for C channels, added in a number of chains."""

    channels: int
    dtype: torch.dtype
    precision: str
    row: tuple[int, ...]  # of the table of tiles

    @cached_property
    def stages(self):
        feats = self.random(BATCH, 6, self.channels).to(self.dtype)
        return block.BlockStages(feats, BASES, self.precision, 0.0)

    def random(self, *shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator).to(DEVICE)

    @cached_property
    def mid(self):
        weight, bias = self.random(self.channels, self.channels), self.random(self.channels)
        return weight.to(self.dtype), bias.to(self.dtype)

    @cached_property
    def wide(self):
        """The weight and the bias in float64."""
        return tuple(tensor.double() for tensor in self.mid)

    @cached_property
    def sums(self):
        return self.random(BATCH, BASES, self.channels)

    @cached_property
    def mass(self):
        return self.random(BATCH, BASES).abs()

    def exact_gram(self):
        weight, bias = self.wide
        return torch.cat([weight.T @ weight, (weight.T @ bias)[None]])

    def exact_mu(self):
        weight, bias = self.wide
        return self.sums.double() @ weight.T + self.mass.double()[..., None] * bias

    @property
    def rounding(self):
        """The bound of results in the features' dtype."""
        return max(torch.finfo(self.dtype).eps, BOUND)


# Channels: some of two chains only; a step and a part of another; less than a step.
CASES = {
    "four-chains": Case(97, torch.float16, "ieee", (16, 32, 16, 4, 4, 2)),
    "eight-chains": Case(97, torch.float32, "tf32x3", (16, 32, 16, 8, 8, 2)),
    "two-chains": Case(80, torch.float32, "tf32x3", (16, 32, 32, 2, 2, 2)),
    "one-chain": Case(10, torch.float32, "ieee", (16, 32, 64, 1, 4, 1)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, monkeypatch):
    monkeypatch.setattr(tiles, "_PROJECTION", request.param.row)
    monkeypatch.setattr(tiles, "_PROJECTION_OF", {})
    tiles.tile.cache_clear()
    yield request.param
    tiles.tile.cache_clear()


def check(got, want, bound=BOUND):
    """The largest difference, over the largest value that is wanted."""
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= bound * want.abs().max()


def test_the_bases_are_folded_and_the_weight_is_squared(case):
    bases = case.random(1, BASES, case.channels)
    gram = bases.new_empty(case.channels + 1, case.channels)
    folded, logit_bias, *_ = case.stages.fold(bases, *case.mid, gram, 3)
    weight, bias = case.wide
    check(folded, bases.double() @ weight, case.rounding)
    check(logit_bias, bases.double() @ bias)
    check(gram, case.exact_gram())


def test_sums_become_folded_bases(case):
    gram = case.exact_gram().float()
    folded, along, square, size = case.stages.project(case.sums, case.mass, *case.mid, gram)
    weight, bias = case.wide
    mu, mass = case.exact_mu(), case.mass.double()
    trace = weight.square().sum() / case.channels
    wanted = trace * case.sums.double().square().sum(2) + (mass * bias.norm()).square()
    size = size.double().view_as(mass)
    check(size, wanted.sqrt())
    check(folded.double() * size[..., None], mu @ weight, 2 * case.rounding)
    check(along.double().sum(0).view_as(mass), mu @ bias)
    check(square.double().sum(0).view_as(mass), mu.square().sum(2))


def test_the_last_bases_have_unit_length(case):
    mu = case.exact_mu()
    got = case.stages.last_bases(case.sums, case.mass, *case.mid)
    check(got, mu / mu.norm(dim=2, keepdim=True), 2 * case.rounding)


def test_a_dead_base_stays_zero(case):
    sums, mass = torch.zeros_like(case.sums), torch.zeros_like(case.mass)
    gram = case.exact_gram().float()
    folded, along, square, size = case.stages.project(sums, mass, *case.mid, gram)
    assert not any(tensor.any() for tensor in (folded, along, square))
    assert torch.equal(size, torch.ones_like(size))
