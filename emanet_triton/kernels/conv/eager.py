"""PyTorch's convolution, with bias, residual and ReLU, on any device."""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.precision import cuda_fp32, without_autocast


def out_shape(x: Tensor, weight: Tensor, stride: int) -> list[int]:
    """[B, O, height, width] of a convolution's output; its padding keeps the size at stride 1."""
    height, width = ((size - 1) // stride + 1 for size in x.shape[2:])
    return [x.shape[0], weight.shape[0], height, width]


def torch_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    dilation: int,
    relu: bool,
    out_dtype: torch.dtype,
    precision: str,
) -> Tensor:
    """One of ``backends.CONVOLUTIONS``: residual and ReLU change the output in place."""
    padding = dilation * (weight.shape[2] // 2)
    with float32_products(x, precision), without_autocast(x.device.type):
        out = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation)
    if residual is not None:
        out = out.add_(residual) if residual.dtype == out.dtype else out + residual
    if relu:
        out.relu_()
    return out.to(out_dtype, memory_format=torch.channels_last)


def float32_products(x: Tensor, precision: str) -> contextlib.AbstractContextManager:
    """A context in which cuDNN multiplies float32 in ``precision``; it takes ieee for tf32x3."""
    if not x.is_cuda or x.dtype != torch.float32:
        return contextlib.nullcontext()
    return cuda_fp32("tf32" if precision == "tf32" else "ieee")
