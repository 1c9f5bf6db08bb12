import errno
import os
import threading

import pytest
import torch
from golden_data import relative_error
from torch.nn import functional as F

from emanet_triton.kernels.conv import scratch, winograd
from emanet_triton.kernels.conv.onednn import compute_dtype
from emanet_triton.kernels.conv.winograd import pack_weight, winograd_conv
from emanet_triton.kernels.out_of_memory import is_out_of_memory

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# x's shape, output channels, dilation
SHAPES = {
    "one-pixel": ((1, 5, 1, 1), 7, 1),
    "whole-tiles": ((1, 16, 8, 12), 8, 1),
    "odd-batch": ((2, 8, 13, 17), 6, 1),
    "dilation2": ((1, 8, 16, 11), 6, 2),
    "dilation4-97": ((1, 8, 97, 97), 8, 4),
    "dilation-beyond-image": ((2, 8, 3, 5), 5, 4),
    "many-blocks": ((3, 4, 50, 260), 4, 1),
    "one-channel": ((1, 1, 9, 9), 1, 1),
    "channels-in-pieces": ((2, winograd.CHANNELS_BYTES // 2 + 3, 9, 11), 6, 2),
}


@pytest.fixture(autouse=True)
def _of_few_pixels_too(monkeypatch):
    monkeypatch.setattr(winograd, "FEW_PIXELS", {4: 0, 2: 0})


def make(shape, outputs, dtype=FP32):
    """x, weight, bias and residual of ordinary size, x channels-last."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator)

    weight = normal(outputs, shape[1], 3, 3) / (9 * shape[1]) ** 0.5
    residual = normal(shape[0], outputs, *shape[2:])
    x = normal(*shape).contiguous(memory_format=torch.channels_last)
    return x.to(dtype), weight.to(dtype), normal(outputs).to(dtype), residual


def exact(x, weight, bias, dilation):
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=dilation, dilation=dilation)


def test_the_transforms_of_one_axis_compute_a_correlation():
    matrices = winograd.INPUT, winograd.FILTER, winograd.OUTPUT
    pixels, taps, outputs = (torch.tensor(m, dtype=torch.float64) for m in matrices)
    x, w = torch.randn(6).double(), torch.randn(3).double()
    want = (x.unfold(0, 3, 1) * w).sum(1)
    torch.testing.assert_close(outputs @ ((taps @ w) * (pixels @ x)), want, rtol=0, atol=1e-13)


def test_in_bfloat16_the_matrix_that_transforms_weights_has_two_parts():
    exact = torch.kron(*[torch.tensor(winograd.FILTER, dtype=torch.float64)] * 2)
    terms = winograd._filter(BF16, torch.device("cpu")).double().split(9, 1)
    assert len(terms) == 2
    torch.testing.assert_close(sum(terms), exact, rtol=2.0**-16, atol=0)
    assert winograd._filter(FP32, torch.device("cpu")).shape == exact.shape


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_of_few_pixels_it_is_the_plain_convolution(monkeypatch, dtype):
    x, weight, bias, residual = make((2, 8, 13, 17), 6, dtype)
    arguments = x, pack_weight(weight), bias, residual
    options = {"dilation": 2, "out_dtype": FP32}
    transformed = winograd_conv(*arguments, **options)
    computed = compute_dtype(dtype)
    monkeypatch.setattr(winograd, "FEW_PIXELS", {computed.itemsize: 13 * 17 + 1})  # of an image
    got = winograd_conv(*arguments, **options)
    operands = (t.to(computed) for t in (x, weight, bias))
    plain = F.conv2d(*operands, padding=2, dilation=2)
    assert got.dtype == FP32
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, (plain + residual).relu(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(got, transformed)


@pytest.mark.parametrize("more", [-1, 1], ids=["plain", "winograd"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_image_has_the_same_bits_in_any_batch(monkeypatch, dtype, more):
    """Also if it has too few pixels for Winograd's algorithm, and the batch has enough."""
    monkeypatch.undo()  # the usual numbers of pixels
    few = winograd.FEW_PIXELS[compute_dtype(dtype).itemsize]
    x, weight, bias, _ = make((3, 64, few // 32 + more, 32), 48, dtype)
    together = winograd_conv(x, pack_weight(weight), bias)
    alone = [winograd_conv(image, pack_weight(weight), bias) for image in x.split(1)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("shape", "outputs", "dilation"), SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, outputs, dilation):
    x, weight, bias, residual = make(shape, outputs)
    packed = pack_weight(weight)
    want = exact(x, weight, bias, dilation)
    got = winograd_conv(x, packed, bias, relu=False, dilation=dilation)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, want) <= 3e-6
    got = winograd_conv(x, packed, bias, residual, dilation=dilation)
    assert relative_error(got, (want + residual).relu()) <= 3e-6


def test_many_channels_round_as_a_plain_convolution_does(products):
    x, weight, bias, _ = make((1, 512, 24, 24), 64)
    want = exact(x, weight, bias, 1)
    plain = relative_error(F.conv2d(x, weight, bias, padding=1), want)
    got = winograd_conv(x, pack_weight(weight), bias, relu=False)
    # x is channels-last: PyTorch's convolution of contiguous images has a smaller error.
    assert relative_error(got, want) <= {"pytorch": 4, "onednn": 6}[products] * plain


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("channels", [64, winograd.CHANNELS_BYTES // 2 + 8])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_half_precision(dtype, channels):
    x, weight, bias, residual = make((1, channels, 24, 24), 64, dtype)
    want = exact(x, weight, bias, 1) + residual
    plain = F.conv2d(x, weight, bias, padding=1) + residual.to(dtype)
    packed = pack_weight(weight)
    options = {"relu": False, "out_dtype": FP32}
    got = winograd_conv(x, packed, bias, residual, **options)
    assert got.dtype == FP32
    assert relative_error(got, want) <= 6 * relative_error(plain, want)
    rounded = winograd_conv(x, packed, bias, residual, relu=False)
    assert torch.equal(rounded, got.to(dtype))


@pytest.mark.parametrize(("shape", "outputs", "dilation"), SHAPES.values(), ids=SHAPES)
def test_bfloat16_of_all_shapes(shape, outputs, dilation):
    x, weight, bias, _ = make(shape, outputs, BF16)
    want = exact(x, weight, bias, dilation)
    got = winograd_conv(x, pack_weight(weight), bias, relu=False, dilation=dilation)
    assert relative_error(got, want) <= 3e-2


def test_bfloat16_without_a_bias():
    x, weight, bias, _ = make((1, 512, 24, 24), 64, BF16)
    bias.zero_()
    want = exact(x, weight, bias, 1)
    plain = relative_error(F.conv2d(x, weight, bias, padding=1), want)
    got = winograd_conv(x, pack_weight(weight), bias, relu=False)
    assert relative_error(got, want) <= 14 * plain


@pytest.mark.usefixtures("products")
def test_any_strides():
    x, weight, bias, residual = make((2, 8, 9, 11), 6)
    packed = pack_weight(weight)
    want = winograd_conv(x, packed, bias, residual)
    wide = torch.cat([x, x], dim=1).contiguous()[:, :8]
    channels_last = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd_conv(wide, packed, bias, channels_last), want)


def test_memory_is_kept_for_the_next_call_unless_the_image_is_large(monkeypatch):
    x, weight, bias, residual = make((2, 8, 13, 17), 6)
    arguments = x, pack_weight(weight), bias, residual
    first = winograd_conv(*arguments)
    kept = scratch._OF_THREAD.memory
    again = winograd_conv(*arguments)  # in memory that the first call has written
    assert scratch._OF_THREAD.memory is kept
    monkeypatch.setattr(winograd, "SMALL_PIXELS", 2 * 13 * 17 - 1)
    large = winograd_conv(*arguments)
    assert scratch._OF_THREAD.memory is None
    assert torch.equal(first, again)
    assert torch.equal(first, large)


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("shape, dilation", [((2, 8, 50, 60), 1), ((1, 8, 31, 29), 4)])
def test_one_thread_and_three_agree(three_threads, shape, dilation):
    x, weight, bias, residual = make(shape, 6)
    arguments = x, pack_weight(weight), bias, residual
    of_three = winograd_conv(*arguments, dilation=dilation)
    torch.set_num_threads(1)
    assert relative_error(of_three, winograd_conv(*arguments, dilation=dilation)) < 1e-6


def test_the_residual_stays():
    x, weight, bias, residual = make((1, 8, 9, 11), 6)
    before = residual.clone()
    winograd_conv(x, pack_weight(weight), bias, residual)
    assert torch.equal(residual, before)


def test_packing_changes_the_memory_only():
    x, weight, bias, residual = make((1, 8, 9, 11), 6)
    packed = pack_weight(weight)
    assert torch.equal(packed, weight)
    assert packed.permute(2, 3, 0, 1).is_contiguous()
    want = winograd_conv(x, packed, bias, residual)
    assert torch.equal(winograd_conv(x, weight, bias, residual), want)


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_operator_is_registered_in_full(out_dtype):
    x, weight, bias, residual = make((1, 8, 9, 11), 6)
    torch.library.opcheck(
        torch.ops.emanet_triton.winograd_conv,
        (x, pack_weight(weight), bias, residual, 2, True, out_dtype),
    )


X, WEIGHT, BIAS = torch.zeros(1, 8, 5, 5), torch.zeros(6, 8, 3, 3), torch.zeros(6)
WRONG = {
    "x-3d": ((X[0], WEIGHT, BIAS), {}, "x must be [B, C, H, W], only B may be 0, got [8, 5, 5]"),
    "x-empty": ((X[:, :, :0], WEIGHT, BIAS), {}, "only B may be 0, got [1, 8, 0, 5]"),
    "weight": ((X, WEIGHT[:, :4], BIAS), {}, "must be [O, 8, 3, 3], got [6, 4, 3, 3]"),
    "kernel": ((X, WEIGHT[:, :, :1, :1], BIAS), {}, "must be [O, 8, 3, 3], got [6, 8, 1, 1]"),
    "dtype": ((X, WEIGHT.half(), BIAS), {}, "weight must be torch.float32 like x"),
    "bias": ((X, WEIGHT, BIAS[1:]), {}, "bias must be [6], got [5]"),
    "residual": ((X, WEIGHT, BIAS, X), {}, "residual must be [1, 6, 5, 5], got [1, 8, 5, 5]"),
    "dilation": ((X, WEIGHT, BIAS), {"dilation": 0}, "dilation must be at least 1, got 0"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, options, message):
    with pytest.raises(ValueError) as raised:
        winograd_conv(*arguments, **options)
    assert message in str(raised.value)


@pytest.mark.parametrize(("number", "lacks_memory"), [(errno.ENOMEM, True), (errno.EPERM, False)])
def test_a_mapping_that_fails(monkeypatch, number, lacks_memory):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(scratch, "_OF_THREAD", threading.local())
    monkeypatch.setattr(scratch.mmap, "mmap", fail)
    x, weight, bias = torch.zeros(1, 8, 64, 64), torch.zeros(8, 8, 3, 3), torch.zeros(8)
    with pytest.raises(OSError) as raised:
        winograd_conv(x, weight, bias)
    assert raised.value.errno == number
    assert is_out_of_memory(raised.value) == lacks_memory
