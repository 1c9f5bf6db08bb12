"""The kernels of the EM attention block against float64, on every branch and on hard inputs."""

import pytest
import torch
from em_cases import DEVICE, DTYPES, Case, assert_as_exact, channels_first, eager_block

from emanet_triton.kernels import em_attention as kernels
from emanet_triton.kernels import reference, tiles
from emanet_triton.kernels.ops import em_attention_block

CASES = (
    Case(1, 3, (1, 1), 1),
    Case(2, 48, (7, 9), 7, "nchw"),
    Case(5, 3, (3, 43), 7, "channels_last", own_bases=True),
    Case(2, 48, (9, 37), 64, "sliced", stages=2),
    Case(1, 48, (25, 40), 7, "cropped", stages=1),
    Case(1, 512, (3, 43), 64, "channels_last", stages=2),
    Case(1, 80, (7, 9), 100, "first", stages=2),
)


def exact_block(x, mu, weights, num_stages):
    weights = (w.double() for w in weights)
    return reference.em_attention_block(
        channels_first(x).double(), mu.double(), *weights, num_stages
    )


def check(case: Case, dtype: torch.dtype, precision: str = "ieee") -> None:
    x, mu, weights = case.feats(dtype).relu(), case.initial_bases(dtype), case.weights(dtype)
    got = em_attention_block(x, mu, *weights, case.stages, backend="triton", precision=precision)
    assert got[0].shape == x.shape
    plain = eager_block(channels_first(x), mu, weights, case.stages)
    exact = exact_block(x, mu, weights, case.stages)
    assert_as_exact(channels_first(got[0]), plain[0], exact[0])
    assert_as_exact(got[1], plain[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", [a for a in tiles.ARCHS if a != "sm_90"])
@pytest.mark.skipif(DEVICE == "cuda", reason="the tiles of another architecture may not fit")
def test_tiles_of_the_other_architectures(arch, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "architecture", lambda device: arch)
    check(Case(1, 80, (3, 43), 7, "channels_last", stages=2), dtype)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.skipif(DEVICE == "cuda", reason="tf32 errs more than plain float32")
def test_precisions_reach_their_tiles(precision):
    check(Case(1, 80, (7, 9), 7, stages=1), torch.float32, precision)


def test_half_features_with_float32_weights():
    case = Case(1, 48, (7, 9), 7)
    x, mu = case.feats(torch.float16), case.initial_bases(torch.float32)
    weights = case.weights(torch.float32)
    out, bases = em_attention_block(x, mu, *weights, backend="triton")
    want_out, want_bases = exact_block(x, mu, weights, 3)
    torch.testing.assert_close(out.mT.double(), want_out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(bases.double(), want_bases, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dead_base_stays_zero_although_the_mid_convolution_has_a_bias(dtype, stages):
    case = Case(2, 16, (3, 43), 4)
    x, (mid_weight, mid_bias, *out) = case.feats(dtype).abs() + 1, case.weights(dtype)
    mid_weight, mid_bias = torch.eye(16).to(mid_weight) + mid_weight.abs(), mid_bias.abs() + 1
    weights = mid_weight, mid_bias, *out
    mu = torch.full((1, 16, 4), 1.0, device=DEVICE, dtype=dtype)
    mu[..., 2] = -20
    got = em_attention_block(x, mu, *weights, stages, backend="triton")
    want = exact_block(x, mu, weights, stages)
    if stages == 1:
        assert got[1][..., 2].count_nonzero() == 0
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for g, w in zip((got[0].mT, got[1]), want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_many_hundreds(dtype):
    case = Case(1, 64, (3, 43), 16)
    x, mu, weights = case.feats(dtype, 150), case.initial_bases(dtype), case.weights(dtype)
    mid_weight, mid_bias = (w.double() for w in weights[:2])
    assert ((x.double() @ mid_weight.T + mid_bias) @ mu.double()).max() > 400
    out, bases = em_attention_block(x, mu, *weights, 1, backend="triton")
    want_out, want_bases = exact_block(x, mu, weights, 1)
    # Two bases whose logits differ by less than the rounding of ν share a position anew.
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(bases.double(), want_bases, rtol=0, atol=tolerance)
    torch.testing.assert_close(out.mT.double(), want_out, rtol=1e-3, atol=4 * tolerance)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_features(value):
    case = Case(2, 16, (3, 43), 5)
    x = torch.full((2, 129, 16), value, device=DEVICE)
    mu, weights = case.initial_bases(x.dtype), case.weights(x.dtype)
    got = em_attention_block(x, mu, *weights, backend="triton")
    want = exact_block(x, mu, weights, 3)
    torch.testing.assert_close(got[0].mT.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_image_and_fills_it():
    case = Case(3, 16, (3, 43), 5)
    x, mu, weights = (f(torch.float32) for f in (case.feats, case.initial_bases, case.weights))
    clean = em_attention_block(x, mu, *weights, backend="triton")
    x[1, 128, 7] = float("nan")
    for got, want in zip(em_attention_block(x, mu, *weights, backend="triton"), clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run_and_in_every_batch(dtype):
    case = Case(3, 24, (9, 37), 30)  # 90 rows of bases: an image's begin within a tile
    x, mu, weights = (f(dtype) for f in (case.feats, case.initial_bases, case.weights))
    together = em_attention_block(x, mu, *weights, 2, backend="triton")
    alone = em_attention_block(x[1:2], mu, *weights, 2, backend="triton")
    again = em_attention_block(x, mu, *weights, 2, backend="triton")
    for i in range(2):
        assert torch.equal(together[i], again[i])
        assert torch.equal(together[i][1:2], alone[i])
