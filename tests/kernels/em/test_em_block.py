"""The kernels of the EM attention block against float64, on every branch and on hard inputs."""

import numpy as np
import pytest
import torch
from device import DEVICE, DTYPES, HALF, tiles_of
from em_cases import (
    Case,
    assert_as_exact,
    channels_first,
    common_case,
    eager_block,
    every_other,
    plain_products,
)

from emanet_triton.kernels.em import attention as kernels
from emanet_triton.kernels.em import reference
from emanet_triton.kernels.em.op import em_attention_block

CASES = (
    Case(1, 7, (1, 1), 3, stages=1),
    common_case(2, "nchw"),
    Case(5, 48, (3, 87), 7, "channels_last", own_bases=True),
    common_case(2, "sliced", stages=2),
    Case(1, 48, (25, 40), 7, "cropped", stages=1),
    Case(1, 48, (7, 9), 100, "first", stages=2),
    Case(1, 7, (3, 43), 3, stages=2),
)


PUBLISHED = Case(1, 512, (3, 43), 64, "channels_last", stages=2)


def exact_block(x, mu, weights, num_stages, **variant):
    weights = (w.double() for w in weights)
    return reference.em_attention_block(
        channels_first(x).double(), mu.double(), *weights, num_stages, **variant
    )


def check(case: Case, dtype: torch.dtype, precision: str = "tf32x3", **variant) -> None:
    x, mu, weights = case.feats(dtype).relu(), case.initial_bases(dtype), case.weights(dtype)
    how = {"backend": "triton", "precision": precision} | variant
    got = em_attention_block(x, mu, *weights, case.stages, **how)
    assert got[0].shape == x.shape
    with plain_products(precision):
        plain = eager_block(channels_first(x), mu, weights, case.stages, **variant)
    exact = exact_block(x, mu, weights, case.stages, **variant)
    assert_as_exact(channels_first(got[0]), plain[0], exact[0])
    assert_as_exact(got[1], plain[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_channels_and_bases_of_the_published_networks(dtype):
    check(PUBLISHED, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_100", "gfx942"))
def test_tiles_of_the_other_architectures(arch, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_arch", lambda device: arch)
    check(Case(1, 80, (3, 43), 7, "channels_last", stages=2), dtype)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precisions_reach_their_tiles(precision):
    check(common_case(stages=1), torch.float32, precision)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("norm_shift", [1e-6, 0.5])
def test_a_shift_of_the_norms(norm_shift, dtype):
    check(common_case(2), dtype, norm_shift=norm_shift)


def test_a_relu_after_the_out_convolution():
    """In half precision; tests/models/test_variants.py has float32. A GPU compiles it once here."""
    check(common_case(2), HALF, out_relu=True)


def test_the_relu_of_the_out_convolution_counts_for_negative_features():
    case = common_case(2)
    x, mu, weights = (f(HALF) for f in (case.feats, case.initial_bases, case.weights))
    got, _ = em_attention_block(x, mu, *weights, out_relu=True, backend="triton")
    want, _ = exact_block(x, mu, weights, 3, out_relu=True)
    torch.testing.assert_close(got.mT.double(), want, rtol=2e-2, atol=2e-2)
    other, _ = em_attention_block(x, mu, *weights, backend="triton")
    assert (other < got - 0.1).any()


def test_float16_holds_the_folded_bases_of_large_weights():
    """Products with W₁ᵀW₁ exceed float16 here; the folded bases, divided by their size, do not."""
    case = common_case(2)
    x, mu, weights = (f(torch.float16) for f in (case.feats, case.initial_bases, case.weights))
    weights = (2**9 * weights[0], 2**9 * weights[1], *weights[2:])
    sums = x.double().mean((0, 1))
    assert (weights[0].double().T @ (weights[0].double() @ sums + weights[1].double())).max() > 1e5
    got = em_attention_block(x, mu, *weights, 2, backend="triton")
    exact = exact_block(x, mu, weights, 2)
    torch.testing.assert_close(got[0].mT.double(), exact[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=0, atol=4e-3)


def test_outputs_beyond_32_bits(monkeypatch):
    case = Case(1, 3, (1, 3), 1, stages=1)
    x, mu, weights = (f(torch.float16) for f in (case.feats, case.initial_bases, case.weights))
    want, _ = em_attention_block(x, mu, *weights, 1, backend="triton")
    memory = torch.from_numpy(np.zeros(2**31 + 2**12, np.float16)).to(DEVICE)
    far = memory.as_strided(x.shape, (1, 2**30 + 8, 1))
    empty_like = torch.empty_like

    def output_far_apart(given, **options):
        return far if given.shape == x.shape else empty_like(given, **options)

    monkeypatch.setattr(torch, "empty_like", output_far_apart)
    got, _ = em_attention_block(x, mu, *weights, 1, backend="triton")
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got.stride(1) == 2**30 + 8


def test_half_features_with_float32_weights():
    case = common_case()
    x, mu = case.feats(torch.float16), case.initial_bases(torch.float32)
    weights = case.weights(torch.float32)
    out, bases = em_attention_block(x, mu, *weights, backend="triton")
    want_out, want_bases = exact_block(x, mu, weights, 3)
    torch.testing.assert_close(out.mT.double(), want_out, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(bases.double(), want_bases, rtol=2e-3, atol=2e-3)


def test_weights_with_others_between_them():
    case = CASES[0]
    x, mu, weights = (f(torch.float32) for f in (case.feats, case.initial_bases, case.weights))
    found = em_attention_block(x, mu, *map(every_other, weights), case.stages, backend="triton")
    for got, want in zip(
        found, em_attention_block(x, mu, *weights, case.stages, backend="triton"), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("norm_shift", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("dtype", "stages"), [*((dtype, 1) for dtype in DTYPES), (torch.float32, 2)], ids=str
)
def test_a_dead_base_stays_zero_although_the_mid_convolution_has_a_bias(dtype, stages, norm_shift):
    case = common_case(2)
    x, (mid_weight, mid_bias, *out) = case.feats(dtype).abs() + 1, case.weights(dtype)
    identity = torch.eye(case.channels).to(mid_weight)
    weights = identity + mid_weight.abs(), mid_bias.abs() + 1, *out
    mu = torch.ones_like(case.initial_bases(dtype))
    mu[..., 2] = -20
    got = em_attention_block(x, mu, *weights, stages, norm_shift=norm_shift, backend="triton")
    want = exact_block(x, mu, weights, stages, norm_shift=norm_shift)
    if stages == 1:
        assert got[1][..., 2].count_nonzero() == 0
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for g, w in zip((got[0].mT, got[1]), want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_many_hundreds(dtype):
    case = common_case()
    x, mu, weights = case.feats(dtype, 150), case.initial_bases(dtype), case.weights(dtype)
    mid_weight, mid_bias = (w.double() for w in weights[:2])
    assert ((x.double() @ mid_weight.T + mid_bias) @ mu.double()).max() > 400
    out, bases = em_attention_block(x, mu, *weights, 1, backend="triton")
    want_out, want_bases = exact_block(x, mu, weights, 1)
    # Two bases whose logits differ by less than the rounding of ν share a position anew.
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(bases.double(), want_bases, rtol=0, atol=tolerance)
    rtol = max(1e-3, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.mT.double(), want_out, rtol=rtol, atol=4 * tolerance)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_features(value):
    case = common_case(2)
    x = torch.full_like(case.feats(torch.float32), value)
    mu, weights = case.initial_bases(x.dtype), case.weights(x.dtype)
    got = em_attention_block(x, mu, *weights, backend="triton")
    want = exact_block(x, mu, weights, 3)
    torch.testing.assert_close(got[0].mT.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_nan_stays_in_its_image_and_fills_it():
    case = common_case(3)
    x, mu, weights = (f(torch.float32) for f in (case.feats, case.initial_bases, case.weights))
    clean = em_attention_block(x, mu, *weights, backend="triton")
    x[1, 128, 7] = float("nan")
    for got, want in zip(em_attention_block(x, mu, *weights, backend="triton"), clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("ordered_products")
def test_the_same_bits_on_every_run_and_in_every_batch(dtype):
    case = Case(11, 48, (1, 257), 7)  # the bases of the tenth image lie in two tiles
    x, mu, weights = (f(dtype) for f in (case.feats, case.initial_bases, case.weights))
    together = em_attention_block(x, mu, *weights, 2, backend="triton")
    alone = em_attention_block(x[9:10], mu, *weights, 2, backend="triton")
    again = em_attention_block(x, mu, *weights, 2, backend="triton")
    for i in range(2):
        assert torch.equal(together[i], again[i])
        assert torch.equal(together[i][9:10], alone[i])
