"""The kernels of EM attention against float64, on every branch and on hard inputs."""

import numpy as np
import pytest
import torch
from device import DEVICE, DTYPES, HALF, tiles_of
from em_cases import (
    Case,
    assert_as_exact,
    channels_first,
    common_case,
    eager_em_attention,
    plain_products,
)

from emanet_triton.kernels.em import attention as kernels
from emanet_triton.kernels.em import reference, tiles
from emanet_triton.kernels.em.op import em_attention

CASES = (
    Case(1, 3, (1, 1), 1),
    common_case(2, "nchw"),
    Case(5, 48, (3, 87), 7, "channels_last", own_bases=True),
    common_case(2, "sliced", stages=2),
    common_case(1, "first", stages=1),
    Case(2, 7, (25, 40), 1, "cropped", stages=2),
    Case(1, 512, (9, 37), 64, "nchw", stages=2),
    Case(1, 48, (7, 9), 100, "channels_last", stages=2),
    Case(1, 48, (7, 9), 256, stages=1),
    Case(1, 2048, (1, 5), 3, stages=1),
)


def check(
    case: Case, dtype: torch.dtype, precision: str = "tf32x3", norm_shift: float = 0.0
) -> None:
    x, mu = case.feats(dtype), case.initial_bases(dtype)
    how = {"norm_shift": norm_shift, "backend": "triton", "precision": precision}
    got = em_attention(x, mu, case.stages, **how)
    assert got[0].shape == x.shape
    if case.layout == "nchw":
        assert got[0].is_contiguous()
    elif case.layout == "channels_last":
        assert got[0].is_contiguous(memory_format=torch.channels_last)
    x = channels_first(x)
    with plain_products(precision):
        plain = eager_em_attention(x, mu, case.stages, norm_shift)
    exact = reference.em_attention(x.double(), mu.double(), case.stages, norm_shift)
    assert_as_exact(channels_first(got[0]), plain[0], exact[0])
    assert_as_exact(got[1], plain[1], exact[1])


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_channels_and_bases_of_the_published_networks(dtype):
    check(Case(1, 512, (25, 40), 64, stages=2), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_100", "gfx942"))
def test_tiles_of_the_other_architectures(arch, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_arch", lambda device: arch)
    check(Case(1, 80, (9, 37), 70, "nchw", stages=2), dtype)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precisions_reach_their_tiles(precision):
    check(common_case(), torch.float32, precision)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("norm_shift", [1e-6, 0.5, 1])
def test_a_shift_of_the_norms(norm_shift, dtype):
    check(common_case(2), dtype, norm_shift=norm_shift)


def test_float32_bases_of_half_features():
    case = common_case()
    x, mu = case.feats(torch.float16), case.initial_bases(torch.float32)
    got = em_attention(x, mu, backend="triton")
    want = em_attention(x, mu.half(), backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float16


@pytest.mark.parametrize("norm_shift", [0.0, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_base_that_no_position_takes_becomes_zero(dtype, norm_shift):
    case = common_case(2)
    x = case.feats(dtype).abs() + 1
    mu = torch.full_like(case.initial_bases(dtype), 10)
    mu[..., 2] = -100
    recon, bases = em_attention(x, mu, 1, norm_shift=norm_shift, backend="triton")
    assert bases[..., 2].count_nonzero() == 0
    want_recon, want_bases = reference.em_attention(x.mT.double(), mu.double(), 1, norm_shift)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(bases.double(), want_bases, rtol=8 * eps, atol=eps)
    torch.testing.assert_close(recon.mT.double(), want_recon, rtol=8 * eps, atol=eps)


def test_a_base_that_fades_keeps_its_direction_in_float16():
    # Its responsibilities, of 6e-9 at most, would all round to zero in float16.
    case = common_case()
    x = case.feats(torch.float16).abs()
    x[..., 0] = 19 + x[..., 1]
    mu = torch.zeros_like(case.initial_bases(torch.float16))
    mu[0, 0, 0] = 1
    _, bases = em_attention(x, mu, 1, backend="triton")
    _, want = reference.em_attention(x.mT.double(), mu.double(), 1)
    torch.testing.assert_close(bases.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_many_hundreds(dtype):
    case = common_case()
    x, mu = case.feats(dtype, scale=150), case.initial_bases(dtype)
    assert (x @ mu).max() > 400
    recon, bases = em_attention(x, mu, 1, backend="triton")
    want_recon, want_bases = reference.em_attention(x.mT.double(), mu.double(), 1)
    # Two bases whose logits differ by less than the rounding of x·mu share a position anew.
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(bases.double(), want_bases, rtol=0, atol=tolerance)
    torch.testing.assert_close(recon.mT.double(), want_recon, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_features(value, dtype):
    case = common_case(2)
    x, mu = torch.full_like(case.feats(dtype), value), case.initial_bases(dtype)
    recon, bases = em_attention(x, mu, backend="triton")
    want = case.channels**-0.5 if value else 0.0  # one vector of equal channels, normalised
    for got in (recon, bases):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_nan_stays_in_its_image_and_fills_it():
    case = common_case(3)
    x, mu = case.feats(torch.float32), case.initial_bases(torch.float32)
    clean = em_attention(x, mu, backend="triton")
    x[1, 128, 7] = float("nan")
    for got, want in zip(em_attention(x, mu, backend="triton"), clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("ordered_products")
def test_the_same_bits_on_every_run_and_in_every_batch(dtype):
    case = common_case(2)
    x, mu = case.feats(dtype), case.initial_bases(dtype)
    together = em_attention(x, mu, 2, backend="triton")
    alone = em_attention(x[1:2], mu, 2, backend="triton")
    again = em_attention(x, mu, 2, backend="triton")
    for i in range(2):
        assert torch.equal(together[i], again[i])
        assert torch.equal(together[i][1:2], alone[i])


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["image", "position", "channel"])
def test_offsets_beyond_32_bits(dim):
    strides = [100, 10, 1]
    strides[dim] = 2**30 + 8
    memory = torch.from_numpy(np.zeros(2**31 + 2**12, np.float16)).to(DEVICE)
    x = memory.as_strided((3, 3, 3), strides)
    case = Case(3, 3, (1, 3), 1)
    x.copy_(case.feats(torch.float16))
    mu = case.initial_bases(torch.float16)
    got = em_attention(x, mu, 2, backend="triton")
    want = em_attention(x.contiguous(), mu, 2, backend="torch")
    for i in range(2):
        torch.testing.assert_close(got[i], want[i], rtol=2e-3, atol=2e-3)


def test_splits_depend_on_the_positions_alone():
    lengths = {n: tiles.split_length(n) for n in (1, 8192, 9409, 12288, 12289, 32768, 131072)}
    assert lengths == {
        1: 256, 8192: 256, 9409: 256, 12288: 256, 12289: 512, 32768: 1024, 131072: 4096
    }  # fmt: skip
