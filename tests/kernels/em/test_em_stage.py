"""E and M step in one pass over the features: 512 channels, channels-last, in half precision."""

import pytest
import torch
from device import HALF, only_on
from em_cases import Case, assert_as_exact, channels_first, eager_em_attention

from emanet_triton.kernels.em import attention, reference, tiles
from emanet_triton.kernels.em.op import em_attention
from emanet_triton.kernels.em.tiles import ONE_PASS_CHANNELS

pytestmark = only_on("sm_90")
# Several ranges of positions, of which the last is not full, and bases that do not fill a tile.
CASE = Case(2, ONE_PASS_CHANNELS, (5, 29), 7, stages=2, own_bases=True)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return CASE.feats(HALF).relu(), CASE.initial_bases(HALF)


def make_stages() -> attention.Stages:
    return attention.Stages(CASE.feats(HALF), CASE.bases, "ieee", 0.0)


def test_against_float64():
    """Of the block too: see test_em_block, the channels and bases of the published networks."""
    assert make_stages().one_pass
    x, mu = inputs()
    got = em_attention(x, mu, CASE.stages, backend="triton")
    plain = eager_em_attention(channels_first(x), mu, CASE.stages)
    exact = reference.em_attention(channels_first(x).double(), mu.double(), CASE.stages)
    assert_as_exact(channels_first(got[0]), plain[0], exact[0])
    assert_as_exact(got[1], plain[1], exact[1])


def test_it_agrees_with_two_kernels(monkeypatch):
    x, mu = inputs()
    one = em_attention(x, mu, CASE.stages, norm_shift=1e-6, backend="triton")
    monkeypatch.setattr(tiles, "has_one_pass", lambda *shape: False)
    assert not make_stages().one_pass
    two = em_attention(x, mu, CASE.stages, norm_shift=1e-6, backend="triton")
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-3, atol=4e-3)


@pytest.mark.usefixtures("ordered_products")
def test_the_same_bits_on_every_run_and_in_every_batch():
    x, mu = inputs()
    together = em_attention(x, mu, CASE.stages, backend="triton")
    again = em_attention(x, mu, CASE.stages, backend="triton")
    alone = em_attention(x[1:], mu[1:], CASE.stages, backend="triton")
    for i in range(2):
        assert torch.equal(together[i], again[i])
        assert torch.equal(together[i][1:], alone[i])


def test_responsibilities_are_written_after_the_last_stage_only():
    stages = make_stages()
    old = attention.Bases(CASE.initial_bases(HALF).mT.contiguous())
    new = torch.empty_like(old.rows)
    stages.z.fill_(float("nan"))
    stages.stage(old, new, is_last=False)
    assert stages.z.isnan().all()
    first = new.clone()
    stages.stage(old, new, is_last=True)
    assert torch.equal(new, first)
    z = stages.z[..., : CASE.bases].double() / attention.Z_SCALES[HALF]
    torch.testing.assert_close(z.sum(2), torch.ones_like(z[..., 0]), rtol=0, atol=4e-3)
    assert stages.z[..., CASE.bases :].count_nonzero() == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_nan_stays_in_its_image():
    x, mu = inputs()
    clean = em_attention(x, mu, CASE.stages, backend="triton")
    x[1, 140, 7] = float("nan")
    found = em_attention(x, mu, CASE.stages, backend="triton")
    for got, want in zip(found, clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    "other",
    [
        {"arch": "sm_80"}, {"dtype": "fp32"}, {"channels": 256}, {"num_bases": 65},
        {"channels_last": False},
    ],
    ids=str,
)  # fmt: skip
def test_where_it_runs(other):
    shape = {"arch": "sm_90", "dtype": "bf16", "channels": 512, "num_bases": 64}
    shape["channels_last"] = True
    assert tiles.has_one_pass(**shape)
    assert not tiles.has_one_pass(**shape | other)
