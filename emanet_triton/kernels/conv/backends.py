"""The backends of a convolution, and which of them are worth measuring on a device."""

from collections.abc import Callable

import torch
from torch import Tensor

from emanet_triton.kernels.conv.cudnn import (
    can_fuse,
    cudnn_benchmark_conv,
    cudnn_conv,
    has_cudnn,
)
from emanet_triton.kernels.conv.eager import torch_conv
from emanet_triton.kernels.conv.tiles import why_not_boxes
from emanet_triton.kernels.device import DTYPE_NAMES, HAS_TRITON, gluon_arch, triton_kernels


def candidates(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    relu: bool,
    precision: str,
    gluon: bool = False,
) -> dict[str, tuple[str, str]]:
    """{name: (backend, precision)} of the candidates on the device of x, the default first.

    Triton's ``"ieee"`` is no candidate for float32, because ``"tf32x3"`` is faster. ``gluon``
    says whether the kernel in Gluon, which no GPU has run, is one.
    """
    pairs = {"torch": ("torch", precision)}
    if has_cudnn(x):
        if can_fuse(x, residual, relu):
            pairs = {"cudnn": ("cudnn", precision)} | pairs
        pairs["cudnn-benchmark"] = "cudnn-benchmark", precision
    if x.is_cuda and HAS_TRITON:
        if x.dtype != torch.float32 or precision != "ieee":
            pairs["triton"] = "triton", precision
        elif torch.version.hip is None:  # AMD has no tf32x3
            pairs["triton-tf32x3"] = "triton", "tf32x3"
        if gluon and not why_not_gluon(x, weight, stride):
            pairs["gluon"] = "gluon", precision
    return pairs


def _triton_conv(x: Tensor, *arguments) -> Tensor:
    with triton_kernels("conv.implicit_gemm", x) as kernels:
        return kernels.conv_bias_act(x, *arguments)


def why_not_gluon(x: Tensor, weight: Tensor, stride: int) -> str | None:
    """What the kernel in Gluon needs and does not get; None if it can run."""
    return why_not_boxes(gluon_arch(x), DTYPE_NAMES[x.dtype], x.shape[1], len(weight), stride)


def _gluon_conv(x: Tensor, weight: Tensor, bias: Tensor, residual, stride: int, *others) -> Tensor:
    if why_not := why_not_gluon(x, weight, stride):
        raise ValueError(f"backend 'gluon' needs {why_not}")
    with triton_kernels("conv.hopper", x) as kernels:
        return kernels.conv_bias_act(x, weight, bias, residual, stride, *others)


# Each takes x, weight, bias, residual, stride, dilation, relu, out_dtype and precision, as
# ``conv_bias_act`` has checked them, and returns the output, channels-last.
CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "cudnn": cudnn_conv,
    "cudnn-benchmark": cudnn_benchmark_conv,
    "triton": _triton_conv,
    "gluon": _gluon_conv,
    "torch": torch_conv,
}
