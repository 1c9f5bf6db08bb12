"""Convolutions of 8-bit integers, compared with float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.conv import int8
from emanet_triton.kernels.conv.int8 import Scale, conv_int8, conv_int8_add_

needs_int8 = pytest.mark.skipif(not int8.has_int8(), reason="no fast products of 8-bit integers")
STEP = 0.03
GEOMETRIES = (
    # (channels, outputs), size, stride, dilation
    ((64, 32), 1, 1, 1),
    ((37, 19), 1, 1, 1),
    ((64, 48), 1, 2, 1),
    ((32, 32), 3, 1, 1),
    ((32, 48), 3, 2, 1),
    ((33, 17), 3, 1, 2),
    ((32, 32), 3, 1, 4),
)


def uint8(*shape: int) -> Tensor:
    tensor = torch.randint(0, 256, shape, dtype=torch.uint8)
    return tensor.contiguous(memory_format=torch.channels_last)


def weights(outputs: int, channels: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """int8 weight, scales and bias; outputs have a standard deviation of about 10."""
    weight = torch.randn(outputs, channels, size, size) / (channels * size * size) ** 0.5
    return *int8.quantize_weight(weight), torch.randn(outputs)


def exact(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], stride=1, dilation=1) -> Tensor:
    weight, scales, bias = (tensor.double() for tensor in weights)
    padding = dilation * (weight.shape[2] // 2)
    out = F.conv2d(x.double() * STEP, weight, None, stride, padding, dilation)
    return out * scales[:, None, None] + bias[:, None, None]


def assert_rounded(found: Tensor, wanted: Tensor, scale: Scale) -> None:
    """``found`` is ``wanted`` in steps, but for values halfway between two steps."""
    steps = (wanted / scale.step + scale.zero).clamp(0, 255)
    assert found.dtype == torch.uint8
    inside = (steps > 0) & (steps < 255)
    assert inside.double().mean() > 0.1  # else nothing would be compared
    assert (found.double() - steps).abs().max() <= 0.5 + 1e-3


@needs_int8
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "signed"])
def test_convolution(geometry, relu):
    (channels, outputs), size, stride, dilation = geometry
    torch.manual_seed(0)
    x, operands = uint8(2, channels, 9, 13), weights(outputs, channels, size)
    scale = Scale.of(8.0) if relu else Scale.of(8.0, signed=True)
    options = {"stride": stride, "dilation": dilation, "relu": relu}
    found = conv_int8(x, *operands, Scale(STEP), scale, **options)
    wanted = exact(x, operands, stride, dilation)
    assert_rounded(found, wanted.relu() if relu else wanted, scale)
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_int8
@pytest.mark.parametrize("channels", [96, int8.CHANNELS + 96, 2 * int8.CHANNELS + 64])
def test_bfloat16_output_is_summed_over_parts_of_the_channels(channels):
    torch.manual_seed(0)
    x, operands = uint8(1, channels, 5, 6), weights(24, channels, 3)
    found = conv_int8(x, *operands, Scale(STEP), None, relu=False)
    wanted = exact(x, operands)
    assert found.dtype == torch.bfloat16
    roundings = -(-channels // int8.CHANNELS)  # to bfloat16, each of half a unit in the last place
    bound = roundings * 2**-8 * wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= bound
    rectified = conv_int8(x, *operands, Scale(STEP), None)
    assert torch.equal(rectified, found.relu())


@needs_int8
@pytest.mark.parametrize("residual_scale", [Scale(0.05), Scale(0.07, 128)], ids=str)
def test_residual_is_overwritten(residual_scale):
    torch.manual_seed(0)
    x, residual, operands = uint8(2, 64, 6, 7), uint8(2, 40, 6, 7), weights(40, 64, 1)
    added = residual_scale.step * (residual.double() - residual_scale.zero)
    wanted, scale = (exact(x, operands) + added).relu(), Scale.of(15.0)
    found = conv_int8_add_(residual, x, *operands, residual_scale, Scale(STEP), scale)
    assert found is residual
    assert_rounded(found, wanted, scale)


@needs_int8
def test_one_weight_for_two_kinds_of_output():
    """Copies of a weight in oneDNN's layout differ by the kind of output, and by the stride."""
    torch.manual_seed(0)
    x, operands = uint8(1, int8.CHANNELS + 96, 5, 6), weights(24, int8.CHANNELS + 96, 3)
    scale = Scale.of(8.0, signed=True)
    for stride in (1, 2, 1):
        wanted = exact(x, operands, stride)
        options = {"stride": stride, "relu": False}
        found = conv_int8(x, *operands, Scale(STEP), None, **options)
        assert (found.double() - wanted).abs().max() <= 2 * 2**-8 * wanted.abs().max()
        assert_rounded(conv_int8(x, *operands, Scale(STEP), scale, **options), wanted, scale)


@needs_int8
def test_weights_of_inference_mode():
    with torch.inference_mode():
        x, operands = uint8(1, 32, 6, 7), weights(16, 32, 3)
        scale = Scale.of(8.0, signed=True)
        found = conv_int8(x, *operands, Scale(STEP), scale, relu=False)
        assert_rounded(found, exact(x, operands), scale)


def test_a_residual_of_another_layout_is_refused():
    x, operands = uint8(1, 32, 6, 7), weights(16, 32, 1)
    with pytest.raises(ValueError, match="residual must be channels-last"):
        conv_int8_add_(
            torch.zeros(1, 16, 6, 7, dtype=torch.uint8), x, *operands, *[Scale(STEP)] * 3
        )


def test_zero_points_that_the_kernel_cannot_take_are_refused():
    x, residual, operands = uint8(1, 32, 6, 7), uint8(1, 16, 6, 7), weights(16, 32, 1)
    plain, shifted = Scale(STEP), Scale(STEP, 128)
    with pytest.raises(ValueError, match="x_scale must be 0, got 128"):
        conv_int8(x, *operands, shifted, None)
    for x_scale, out_scale, name in ((shifted, plain, "x_scale"), (plain, shifted, "out_scale")):
        with pytest.raises(ValueError, match=f"{name} must be 0, got 128"):
            conv_int8_add_(residual, x, *operands, plain, x_scale, out_scale)


@needs_int8
def test_a_changed_weight_is_packed_again():
    x, (weight, scales, bias) = uint8(1, 32, 4, 4), weights(32, 32, 3)
    first = conv_int8(x, weight, scales, bias, Scale(STEP), None)
    weight.neg_()
    second = conv_int8(x, weight, scales, bias, Scale(STEP), None)
    assert not torch.equal(first, second)
    assert torch.equal(second, conv_int8(x, weight.clone(), scales, bias, Scale(STEP), None))


@needs_int8
def test_same_bits_in_any_batch_and_with_any_number_of_threads():
    torch.manual_seed(0)
    x, operands = uint8(3, 64, 17, 19), weights(64, 64, 3)
    together = conv_int8(x, *operands, Scale(STEP), Scale.of(8.0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [conv_int8(each, *operands, Scale(STEP), Scale.of(8.0)) for each in x.split(1)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


def test_empty_batch():
    x, operands = uint8(0, 32, 5, 6), weights(16, 32, 1)
    assert conv_int8(x, *operands, Scale(STEP), None, stride=2).shape == (0, 16, 3, 3)


def test_the_rounded_tensor_stays_as_it_is():
    x = torch.tensor([1.0, 2.0, 300.0])
    int8.quantize(x, Scale.of(2.0))
    assert x.tolist() == [1.0, 2.0, 300.0]


def test_values_are_rounded_and_saturate():
    values = torch.tensor([-1.0, 0.0, 0.24, 0.26, 127.0, 300.0], dtype=torch.bfloat16)
    assert int8.quantize(values, Scale(0.5)).tolist() == [0, 0, 0, 1, 254, 255]
    assert int8.quantize(values, Scale(1.0, 128)).tolist() == [127, 128, 128, 128, 255, 255]


def test_scales_hold_the_largest_value():
    assert int8.quantize(torch.tensor([0.0, 6.0]), Scale.of(6.0)).tolist() == [0, 255]
    signed = Scale.of(6.0, signed=True)
    assert int8.quantize(torch.tensor([-6.0, 0.0, 6.0]), signed).tolist() == [1, 128, 255]
    assert Scale.of(0.0).step > 0


def test_weights_have_a_scale_for_each_output_channel():
    weight = torch.randn(5, 7, 3, 3) * torch.logspace(-3, 3, 5)[:, None, None, None]
    weight[2] = 0
    rounded, scales = int8.quantize_weight(weight)
    assert rounded.dtype == torch.int8
    assert rounded.abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127, 127]
    error = (weight - scales[:, None, None, None] * rounded).abs().amax((1, 2, 3))
    assert (error <= scales * 0.501).all()


@pytest.mark.parametrize(
    ("capability", "expected"), [("amx", True), ("avx512_bf16", True), ("avx512", False)]
)
def test_older_cpus_would_saturate(capability, expected, monkeypatch):
    monkeypatch.setattr(int8, "cpu_capability", lambda: capability)
    assert int8.has_int8() == (expected and torch.backends.mkldnn.is_available())
