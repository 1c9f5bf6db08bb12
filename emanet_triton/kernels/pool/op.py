"""The operator of the pooling in a ResNet's stem: checks, choice of a backend, registration."""

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.checks import BACKENDS, check_choice, check_float, check_layout
from emanet_triton.kernels.device import auto_backend, triton_kernels
from emanet_triton.kernels.registration import Operator, register

_NHWC = torch.channels_last


@torch.no_grad()
def max_pool(x: Tensor, *, backend: str = "auto") -> Tensor:
    """Take the maximum of 3x3 pixels at stride 2 and padding 1 (mmseg ``ResNet.maxpool``).

    All backends return what ``torch.nn.functional.max_pool2d`` returns: a window with a NaN gives
    NaN, and the padding is never the maximum. Only of +0 and -0 may they return different ones,
    and NaN may have other bits.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16, or uint8 for the backend "torch".
            Channels-last memory needs no copy.
        backend: ``"triton"`` runs on a GPU and in Triton's interpreter; ``"torch"`` runs anywhere;
            ``"auto"`` is ``"triton"`` where it runs on a GPU.

    Returns:
        [B, C, ceil(H / 2), ceil(W / 2)] in the dtype of ``x``, channels-last. No gradient flows
        through it.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run here.
    """
    check_layout("x", x, "B, C, H, W")
    check_choice("backend", backend, BACKENDS)
    if x.dtype != torch.uint8 or backend != "torch":
        check_float("x", x.dtype)
    return torch.ops.emanet_triton.max_pool(x, backend)


def _run_max_pool(x: Tensor, backend: str) -> Tensor:
    if backend == "auto":
        backend = auto_backend(x.is_cuda)
    if backend == "torch":
        x = x.contiguous(memory_format=_NHWC)
        if x.dtype == torch.uint8:  # PyTorch pools no integers on a CPU
            return _halved(_halved(x, 2), 3)
        return F.max_pool2d(x, 3, stride=2, padding=1).contiguous(memory_format=_NHWC)
    with triton_kernels("pool.max_pool", x) as kernels:
        return kernels.max_pool(x)


def _halved(x: Tensor, dim: int) -> Tensor:
    """The maximum of each second element of an axis and of its two neighbours."""
    even, odd = (x[:, :, i::2] if dim == 2 else x[..., i::2] for i in (0, 1))
    out = even.clone(memory_format=_NHWC)
    for first, neighbours in ((0, odd), (1, odd.narrow(dim, 0, out.shape[dim] - 1))):
        part = out.narrow(dim, first, neighbours.shape[dim])
        torch.maximum(part, neighbours, out=part)
    return out


def _fake_max_pool(x: Tensor, backend: str) -> Tensor:
    batch, channels, height, width = x.shape
    shape = batch, channels, (height + 1) // 2, (width + 1) // 2
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_NHWC)


register(__name__, Operator("max_pool", _run_max_pool, _fake_max_pool))
