"""The kernels of EM attention against float64, on every branch and on hard inputs."""

import numpy as np
import pytest
import torch
from em_cases import DEVICE, DTYPES, Case, assert_as_exact, channels_first, eager_em_attention

from emanet_triton.kernels import em_attention as kernels
from emanet_triton.kernels import reference, tiles
from emanet_triton.kernels.ops import em_attention

CASES = (
    Case(1, 3, (1, 1), 1),
    Case(2, 48, (7, 9), 7, "nchw"),
    Case(5, 3, (3, 43), 7, "channels_last", own_bases=True),
    Case(2, 48, (9, 37), 64, "sliced", stages=2),
    Case(1, 48, (9, 37), 64, "first", stages=1),
    Case(2, 7, (25, 40), 1, "cropped", stages=2),
    Case(1, 512, (3, 43), 64, "nchw"),
    Case(1, 512, (25, 40), 64, stages=2),
    Case(1, 48, (7, 9), 100, "channels_last", stages=2),
    Case(1, 48, (7, 9), 256, stages=1),
    Case(1, 2048, (1, 5), 3, stages=1),
)


def check(case: Case, dtype: torch.dtype, precision: str = "ieee") -> None:
    x, mu = case.feats(dtype), case.initial_bases(dtype)
    got = em_attention(x, mu, case.stages, backend="triton", precision=precision)
    assert got[0].shape == x.shape
    if case.layout == "nchw":
        assert got[0].is_contiguous()
    elif case.layout == "channels_last":
        assert got[0].is_contiguous(memory_format=torch.channels_last)
    x = channels_first(x)
    plain = eager_em_attention(x, mu, case.stages)
    exact = reference.em_attention(x.double(), mu.double(), case.stages)
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
    check(Case(1, 80, (9, 37), 70, "nchw", stages=2), dtype)


@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
@pytest.mark.skipif(DEVICE == "cuda", reason="tf32 errs more than plain float32")
def test_precisions_reach_their_tiles(precision):
    check(Case(1, 80, (3, 43), 7, stages=1), torch.float32, precision)


def test_float32_bases_of_half_features():
    case = Case(1, 48, (7, 9), 7)
    x, mu = case.feats(torch.float16), case.initial_bases(torch.float32)
    got = em_attention(x, mu, backend="triton")
    want = em_attention(x, mu.half(), backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1].dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_base_that_no_position_takes_becomes_zero(dtype):
    x = Case(2, 16, (3, 43), 4).feats(dtype).abs() + 1
    mu = torch.full((1, 16, 4), 10.0, device=DEVICE, dtype=dtype)
    mu[..., 2] = -100
    recon, bases = em_attention(x, mu, 1, backend="triton")
    assert bases[..., 2].count_nonzero() == 0
    want_recon, want_bases = reference.em_attention(x.mT.double(), mu.double(), 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(bases.double(), want_bases, rtol=8 * eps, atol=eps)
    torch.testing.assert_close(recon.mT.double(), want_recon, rtol=8 * eps, atol=eps)


def test_a_base_that_fades_keeps_its_direction_in_float16():
    # Its responsibilities, about 4e-8, are below float16's smallest number.
    x = Case(1, 8, (3, 43), 2).feats(torch.float16).abs()
    x[..., 0] = 17
    mu = torch.zeros(1, 8, 2, device=DEVICE, dtype=torch.float16)
    mu[0, 0, 0] = 1
    _, bases = em_attention(x, mu, 1, backend="triton")
    _, want = reference.em_attention(x.mT.double(), mu.double(), 1)
    torch.testing.assert_close(bases.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_many_hundreds(dtype):
    case = Case(1, 64, (9, 37), 16)
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
    x = torch.full((2, 129, 16), value, device=DEVICE, dtype=dtype)
    mu = Case(2, 16, (3, 43), 5).initial_bases(dtype)
    recon, bases = em_attention(x, mu, backend="triton")
    want = 0.25 if value else 0.0  # one vector of 16 equal channels, normalised
    for got in (recon, bases):
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-2, atol=0)


def test_nan_stays_in_its_image_and_fills_it():
    case = Case(3, 16, (3, 43), 5)
    x, mu = case.feats(torch.float32), case.initial_bases(torch.float32)
    clean = em_attention(x, mu, backend="triton")
    x[1, 128, 7] = float("nan")
    for got, want in zip(em_attention(x, mu, backend="triton"), clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run_and_in_every_batch(dtype):
    case = Case(3, 24, (25, 40), 5)
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
    x.copy_(Case(3, 3, (1, 3), 2).feats(torch.float16))
    mu = Case(3, 3, (1, 3), 2).initial_bases(torch.float16)
    got = em_attention(x, mu, 2, backend="triton")
    want = em_attention(x.contiguous(), mu, 2, backend="triton")
    for i in range(2):
        torch.testing.assert_close(got[i], want[i])


def test_splits_depend_on_the_positions_alone():
    lengths = {n: kernels.split_length(n) for n in (1, 8192, 9409, 12288, 12289, 32768, 131072)}
    assert lengths == {
        1: 256, 8192: 256, 9409: 256, 12288: 256, 12289: 512, 32768: 1024, 131072: 4096
    }  # fmt: skip
