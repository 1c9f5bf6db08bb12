"""cuDNN's convolutions on NVIDIA GPUs, with bias, residual and ReLU fused if possible."""

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emanet_triton.errors import first_line
from emanet_triton.kernels.conv.eager import float32_products, torch_conv
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_refused
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.kernels.settings import Setting

_NHWC = torch.channels_last
_ONE_AT_A_TIME = threading.RLock()  # for several threads whose settings differ
_REFUSED: set[tuple] = set()  # convolutions for which cuDNN has no fused engine


def has_cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.version.cuda is not None and torch.backends.cudnn.is_available()


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
    """One of ``backends.CONVOLUTIONS``: cuDNN's fused convolution, or else ``torch_conv``.

    Raises:
        ValueError: x is not on an NVIDIA GPU.
        torch.OutOfMemoryError: memory ran out, even if cuDNN reports a missing engine.
    """
    if not has_cudnn(x):
        raise ValueError(f"backend 'cudnn' needs an NVIDIA GPU and cuDNN; x is on {x.device}")
    arguments = x, weight, bias, residual, stride, dilation, relu, out_dtype, precision
    added = None if residual is None else residual.dtype
    shape = x.shape, weight.shape, x.dtype, added, stride, dilation, precision, x.device
    if not can_fuse(x, residual, relu) or shape in _REFUSED:
        return torch_conv(*arguments)
    try:
        out = _fused_conv(x, weight, bias, residual, stride, dilation, precision)
    except RuntimeError as error:
        if not is_refused(error):
            raise
        out = _torch_conv_instead(*arguments)
        _REFUSED.add(shape)
        sizes = f"{list(x.shape)} with {list(weight.shape)} and dilation {dilation}"
        warnings.warn(
            f"cuDNN has no fused convolution of {x.dtype} {sizes}, so PyTorch's is used: "
            f"{first_line(error)}",
            stacklevel=2,
        )
    return out.to(out_dtype, memory_format=_NHWC)


def can_fuse(x: Tensor, residual: Tensor | None, relu: bool) -> bool:
    """Whether cuDNN can fuse: a ReLU follows, and a residual, if any, has the dtype of x.

    The residual must not be the input (github.com/pytorch/pytorch/issues/62926).
    """
    fits = residual is None or (residual.dtype == x.dtype and not _share_memory(residual, x))
    return relu and fits


def _fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    dilation: int,
    precision: str,
) -> Tensor:
    """Convolve in the dtype of x, slowly for some (github.com/pytorch/pytorch/issues/68506)."""
    x, weight = x.contiguous(memory_format=_NHWC), weight.contiguous(memory_format=_NHWC)
    padding = dilation * (weight.shape[2] // 2)
    geometry = bias.to(x.dtype), (stride,) * 2, (padding,) * 2, (dilation,) * 2, 1
    with float32_products(x, precision):
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, *geometry)
        residual = residual.contiguous(memory_format=_NHWC)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, *geometry)


def _torch_conv_instead(x: Tensor, *arguments) -> Tensor:
    """``torch_conv`` after cuDNN has refused to fuse; raises if memory is the reason."""
    watch = MemoryWatch(x.device)
    try:
        return torch_conv(x, *arguments)
    except RuntimeError as error:
        if is_refused(error) and watch.explains(error):
            raise torch.OutOfMemoryError(f"no memory for a convolution: {error}") from error
        raise


def cudnn_benchmark_conv(x: Tensor, *arguments) -> Tensor:
    """One of ``backends.CONVOLUTIONS``: at the first call of a shape cuDNN measures its engines.

    Every process measures anew. PyTorch keeps one engine for a shape and some settings, whether it
    was measured or not. So the settings here must differ from those of ``cudnn_conv``. For a plain
    convolution, ``deterministic`` differs. A fused convolution ignores ``deterministic``, so for it
    the TF32 setting differs, which has no effect in half precision. In float32 the TF32 setting
    would change the result, so this function does not fuse float32. But a float32 convolution that
    another thread launches meanwhile may get this setting: see ``Setting``.
    """
    settings: Any = torch.backends.cudnn  # has attributes that no type checker sees
    # While a CUDA graph is recorded nothing can be measured, but PyTorch can use an engine it kept.
    measures = not torch.cuda.is_current_stream_capturing()
    with _ONE_AT_A_TIME, _CUDNN(_Engines(measures, deterministic=True)):
        if x.dtype == torch.float32:
            return torch_conv(x, *arguments)
        other = "ieee" if settings.conv.fp32_precision == "tf32" else "tf32"
        with cuda_fp32(other):
            return cudnn_conv(x, *arguments)


class _Engines(NamedTuple):
    """How cuDNN chooses an engine: PyTorch's settings of these names."""

    benchmark: bool
    deterministic: bool

    @classmethod
    def found(cls) -> "_Engines":
        return cls(torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)

    def set(self) -> Callable[[], None]:
        """Set them; returns a function that restores them."""
        before = self.found()
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self

        def restore() -> None:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before

        return restore


_CUDNN = Setting(lambda engines: engines == _Engines.found(), _Engines.set)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
