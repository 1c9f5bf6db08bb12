"""The providers of convolution: PyTorch, cuDNN's fused operators, Triton.

Each takes (x, weight, bias, residual, stride, dilation, relu, out_dtype, precision) as
``conv.conv_bias_act`` has checked them, and returns the output, channels-last.
"""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.device import triton_kernels
from emanet_triton.kernels.precision import cuda_fp32

_NHWC = torch.channels_last


def has_cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.version.cuda is not None and torch.backends.cudnn.is_available()


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
    """The convolution of PyTorch, then in place what it cannot fuse."""
    padding = dilation * (weight.shape[2] // 2)
    with _cudnn_precision(x, precision):
        out = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation)
    if residual is not None:
        out = out.add_(residual) if residual.dtype == out.dtype else out + residual
    if relu:
        out.relu_()
    return out.to(out_dtype, memory_format=_NHWC)


def cudnn_conv(
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
    """cuDNN's fused convolution; what it does not know is left to ``torch_conv``.

    It has no form without ReLU, rounds to the dtype of its input, and wants a residual of that
    dtype which is not its input (github.com/pytorch/pytorch/issues/62926). It may be slow for
    some shapes (issue 68506).
    """
    if not has_cudnn(x):
        raise ValueError(f"provider 'cudnn' needs an NVIDIA GPU and cuDNN; x is on {x.device}")
    fits = residual is None or (residual.dtype == x.dtype and not _share_memory(residual, x))
    if not (relu and fits):
        return torch_conv(x, weight, bias, residual, stride, dilation, relu, out_dtype, precision)
    x, weight = x.contiguous(memory_format=_NHWC), weight.contiguous(memory_format=_NHWC)
    padding = dilation * (weight.shape[2] // 2)
    geometry = bias.to(x.dtype), (stride,) * 2, (padding,) * 2, (dilation,) * 2, 1
    with _cudnn_precision(x, precision):
        if residual is None:
            out = torch.cudnn_convolution_relu(x, weight, *geometry)
        else:
            residual = residual.contiguous(memory_format=_NHWC)
            out = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, *geometry)
    return out.to(out_dtype, memory_format=_NHWC)


def triton_conv(
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
    with triton_kernels("conv_triton", x.device, "provider") as kernels:
        return kernels.conv_bias_act(
            x, weight, bias, residual, stride, dilation, relu, out_dtype, precision
        )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _cudnn_precision(x: Tensor, precision: str) -> contextlib.AbstractContextManager:
    if not x.is_cuda or x.dtype != torch.float32:
        return contextlib.nullcontext()
    return cuda_fp32("tf32" if precision == "tf32" else "ieee")


CONVOLUTIONS = {"cudnn": cudnn_conv, "triton": triton_conv, "torch": torch_conv}
