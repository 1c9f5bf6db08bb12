"""Convolutions of 8-bit integers on a CPU, by oneDNN.

Activations are unsigned: ``value = scale * (q - zero)``, with one scale and zero point for a whole
tensor. Weights are signed, with a scale for each output channel. Products are summed in 32-bit
integers; only the sum is scaled and rounded, to the nearest even number.

PyTorch ships these operations for quantised networks that its compiler makes, as
``torch.ops.onednn``. They multiply weights in a layout of oneDNN's own, which is kept beside the
weights, as in ``onednn``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels import flops
from emanet_triton.kernels.conv.eager import out_shape
from emanet_triton.kernels.conv.packed import kept
from emanet_triton.kernels.device import cpu_capability
from emanet_triton.kernels.registration import Operator, register

LARGEST, LARGEST_WEIGHT = 255, 127
# These sum products of 8-bit integers in 32 bits, and the tests run on them. CPUs without such
# instructions add two products in 16 bits, which saturate.
CAPABILITIES = ("amx", "avx512_bf16")
# With AMX and two threads, one 3x3 convolution of 2048 channels takes 1.4 times as long as two of
# 1024 at 64 x 128 pixels. For some other sizes oneDNN wants the weights of 2048 in another layout,
# into which it copies them at each call.
CHANNELS = 1024


class Scale(NamedTuple):
    """What 8-bit activations mean: ``value = step * (q - zero)``."""

    step: float
    zero: int = 0

    @classmethod
    def of(cls, largest: float, signed: bool = False) -> "Scale":
        """The scale for values from 0, or if ``signed`` from ``-largest``, to ``largest``."""
        largest = max(largest, 1e-20)  # a layer may be zero everywhere
        return cls(largest / 127, 128) if signed else cls(largest / LARGEST)


def has_int8() -> bool:
    """Whether this CPU is one of ``CAPABILITIES``, and oneDNN is there."""
    return torch.backends.mkldnn.is_available() and cpu_capability() in CAPABILITIES


def quantize(x: Tensor, scale: Scale) -> Tensor:
    """Round a tensor of any shape and floating dtype to uint8; values out of range saturate."""
    steps = x.float().div(scale.step)
    return steps.round_().add_(scale.zero).clamp_(0, LARGEST).to(torch.uint8)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round the weight of a convolution to int8.

    Args:
        weight: float32 [O, C, k, k].

    Returns:
        int8 [O, C, k, k] and float32 [O]: ``weight ≈ scales[:, None, None, None] * rounded``.
    """
    scales = weight.abs().amax((1, 2, 3)).clamp_min(1e-20) / LARGEST_WEIGHT
    return (weight / scales[:, None, None, None]).round().to(torch.int8), scales


@torch.no_grad()
def conv_int8(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    x_scale: Scale,
    out_scale: Scale | None,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """Convolve 8-bit integers, add the bias and apply ReLU.

    Args:
        x: uint8 [B, C, H, W] on the CPU, channels-last.
        weight, weight_scales: as ``quantize_weight`` returns them. k is odd, and the padding is
            ``dilation * (k // 2)``.
        bias: float32 [O].
        x_scale: of ``x``; its zero point is 0.
        out_scale: of the output; ``None``: the output is bfloat16.
        stride, dilation: at least 1.
        relu: whether negative values become zero.

    Returns:
        uint8, or bfloat16, [B, O, ceil(H / stride), ceil(W / stride)], channels-last.

    Raises:
        ValueError: the zero point of ``x_scale`` is not 0.
    """
    _check_zero_points(x_scale=x_scale)
    step, zero = out_scale or (0.0, 0)
    arguments = x, weight, weight_scales, bias, x_scale.step, step, zero
    return torch.ops.emanet_triton.conv_int8(*arguments, stride, dilation, relu)


@torch.no_grad()
def conv_int8_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    residual_scale: Scale,
    x_scale: Scale,
    out_scale: Scale,
) -> Tensor:
    """A 1x1 convolution with bias, residual and ReLU, in the residual's memory.

    Args:
        residual: uint8 [B, O, H, W], channels-last; overwritten with the result.
        residual_scale: of ``residual``.
        out_scale: of the result; its zero point is 0.

    The other arguments are those of ``conv_int8``. Returns ``residual``.

    Raises:
        ValueError: the residual is not channels-last, or the zero point of ``x_scale`` or
            ``out_scale`` is not 0.
    """
    _check_zero_points(x_scale=x_scale, out_scale=out_scale)
    if not residual.is_contiguous(memory_format=torch.channels_last):
        raise ValueError("residual must be channels-last in memory")
    arguments = x, weight, weight_scales, bias, *residual_scale, x_scale.step, out_scale.step
    torch.ops.emanet_triton.conv_int8_add_(residual, *arguments)
    return residual


def _check_zero_points(**scales: Scale) -> None:
    for name, scale in scales.items():
        if scale.zero != 0:
            raise ValueError(f"the zero point of {name} must be 0, got {scale.zero}")


def _run(
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    x_step: float,
    out_step: float,
    out_zero: int,
    stride: int,
    dilation: int,
    relu: bool,
) -> Tensor:
    size = weight.shape[2]
    activation = "relu" if relu else "none"
    result = (out_step, out_zero, torch.uint8) if out_step else (1.0, 0, torch.bfloat16)
    scales = weight_scales, torch.zeros_like(weight_scales, dtype=torch.int32)
    if size == stride == 1:
        rows = x.permute(0, 2, 3, 1), x_step, 0
        weights = _packed_matrix(weight), *scales, bias
        out = torch.ops.onednn.qlinear_pointwise(*rows, *weights, *result, activation, [], "")
        return out.permute(0, 3, 1, 2)
    geometry = [stride] * 2, [dilation * (size // 2)] * 2, [dilation] * 2
    # A sum of 8-bit parts would be rounded twice.
    channels = x.shape[1] if out_step else CHANNELS
    parts = [part.contiguous(memory_format=torch.channels_last) for part in x.split(channels, 1)]
    packed = _packed_parts(weight, channels, geometry)
    first = parts[0], x_step, 0, packed[0], *scales, bias, *geometry, 1
    end = "none" if len(parts) > 1 else activation
    out = torch.ops.onednn.qconv2d_pointwise(*first, *result, end, [], "")
    for i in range(1, len(parts)):
        operands = parts[i], x_step, 0, packed[i], *scales, out, None, *geometry, 1
        end = "none" if i < len(parts) - 1 else activation
        out = torch.ops.onednn.qconv2d_pointwise.binary(
            *operands, *result, 1.0, 0, "sum", 1.0, end, [], ""
        )
    return out


def _run_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor,
    residual_step: float,
    residual_zero: int,
    x_step: float,
    out_step: float,
) -> None:
    zeros = torch.zeros_like(weight_scales, dtype=torch.int32)
    rows, total = (tensor.permute(0, 2, 3, 1) for tensor in (x, residual))
    operands = rows, x_step, 0, _packed_matrix(weight), weight_scales, zeros, total, bias
    result = out_step, 0, torch.uint8
    torch.ops.onednn.qlinear_pointwise.binary(  # writes its output over ``total``
        *operands, *result, residual_step, residual_zero, "sum", 1.0, "relu", [], ""
    )


def _packed_matrix(weight: Tensor) -> Tensor:
    """The weight [O, C, 1, 1] in oneDNN's layout for matrix products."""
    return kept(weight, "matrix", lambda: torch.ops.onednn.qlinear_prepack(weight.flatten(1), None))


def _packed_parts(
    weight: Tensor, channels: int, geometry: tuple[list[int], list[int], list[int]]
) -> list[Tensor]:
    """The weight in oneDNN's layout, in parts of so many input channels."""
    scales = weight.new_ones(len(weight), dtype=torch.float32)
    prepack = torch.ops.onednn.qconv_prepack
    return kept(
        weight,
        (channels, geometry),
        lambda: [
            prepack(part.contiguous(), scales, 1.0, 0, *geometry, 1)
            for part in weight.split(channels, dim=1)
        ],
    )


def _fake(
    x, weight, weight_scales, bias, x_step, out_step, out_zero, stride, dilation, relu
) -> Tensor:
    return torch.empty(
        out_shape(x, weight, stride),
        dtype=torch.uint8 if out_step else torch.bfloat16,
        device=x.device,
        memory_format=torch.channels_last,
    )


register(
    __name__,
    Operator("conv_int8", _run, _fake, "CPU", flops=flops.first_convolution),
    Operator(
        "conv_int8_add_",
        _run_add_,
        lambda *_: None,
        "CPU",
        mutates=("residual",),
        flops=lambda residual, x, weight, *_, **__: flops.convolution(residual, weight),
    ),
)
