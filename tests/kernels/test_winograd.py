import pytest
import torch
from golden_data import relative_error
from torch.nn import functional as F

from emanet_triton.kernels import winograd
from emanet_triton.kernels.winograd import transform_weight, winograd_conv

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
}


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


@pytest.mark.parametrize(("shape", "outputs", "dilation"), SHAPES.values(), ids=SHAPES)
def test_against_float64(shape, outputs, dilation):
    x, weight, bias, residual = make(shape, outputs)
    transformed = transform_weight(weight, FP32)
    want = exact(x, weight, bias, dilation)
    got = winograd_conv(x, transformed, bias, relu=False, dilation=dilation)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, want) <= 3e-6
    got = winograd_conv(x, transformed, bias, residual, dilation=dilation)
    assert relative_error(got, (want + residual).relu()) <= 3e-6


def test_many_channels_round_as_a_plain_convolution_does():
    x, weight, bias, _ = make((1, 512, 24, 24), 64)
    want = exact(x, weight, bias, 1)
    plain = relative_error(F.conv2d(x, weight, bias, padding=1), want)
    got = winograd_conv(x, transform_weight(weight, FP32), bias, relu=False)
    assert relative_error(got, want) <= 4 * plain


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_half_precision(dtype):
    x, weight, bias, residual = make((1, 64, 24, 24), 64, dtype)
    want = exact(x, weight, bias, 1) + residual
    plain = F.conv2d(x, weight, bias, padding=1) + residual.to(dtype)
    transformed = transform_weight(weight, dtype)
    options = {"relu": False, "out_dtype": FP32}
    got = winograd_conv(x, transformed, bias, residual, **options)
    assert got.dtype == FP32
    assert relative_error(got, want) <= 6 * relative_error(plain, want)
    rounded = winograd_conv(x, transformed, bias, residual, relu=False)
    assert torch.equal(rounded, got.to(dtype))


def test_any_strides():
    x, weight, bias, residual = make((2, 8, 9, 11), 6)
    transformed = transform_weight(weight, FP32)
    want = winograd_conv(x, transformed, bias, residual)
    wide = torch.cat([x, x], dim=1).contiguous()[:, :8]
    channels_last = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd_conv(wide, transformed, bias, channels_last), want)


def test_the_residual_stays():
    x, weight, bias, residual = make((1, 8, 9, 11), 6)
    before = residual.clone()
    winograd_conv(x, transform_weight(weight, FP32), bias, residual)
    assert torch.equal(residual, before)


def test_weights_are_transformed_in_float64():
    weight = make((1, 8, 4, 4), 6)[1]
    want = transform_weight(weight, torch.float64)
    assert want.shape == (36, 8, 6)
    assert torch.equal(transform_weight(weight, FP32), want.float())


@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_operator_is_registered_in_full(out_dtype):
    x, weight, bias, residual = make((1, 8, 9, 11), 6)
    torch.library.opcheck(
        torch.ops.emanet_triton.winograd_conv,
        (x, transform_weight(weight, FP32), bias, residual, 2, True, out_dtype),
    )


X, WEIGHT, BIAS = torch.zeros(1, 8, 5, 5), torch.zeros(36, 8, 6), torch.zeros(6)
WRONG = {
    "x-3d": ((X[0], WEIGHT, BIAS), {}, "x must be [B, C, H, W] and not empty, got [8, 5, 5]"),
    "x-empty": ((X[:0], WEIGHT, BIAS), {}, "and not empty, got [0, 8, 5, 5]"),
    "weight": ((X, WEIGHT[:16], BIAS), {}, "weight must be [36, 8, O], got [16, 8, 6]"),
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


def test_only_3x3_kernels_are_transformed():
    with pytest.raises(ValueError, match=r"weight must be \[O, C, 3, 3\], got \[6, 8, 1, 1\]"):
        transform_weight(torch.zeros(6, 8, 1, 1), FP32)
