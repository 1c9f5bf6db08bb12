"""Convolution with bias, residual and ReLU in one pass on the CPU, by oneDNN.

PyTorch ships oneDNN's fused convolutions for its compiler, as ``torch.ops.mkldnn``. They save
memory and time: the sum overwrites the residual, and an allocation of tens of megabytes takes as
long as a small convolution.

oneDNN multiplies weights that lie in a layout of its own, into which it copies other weights at
every call. Where its products are so fast that the copies count, they are kept beside the weights.
There wide images are convolved in blocks of columns, too: to write a row of outputs, oneDNN reads
k rows of pixels, and is slow if they do not fit into a core's cache. A 1x1 convolution to more
channels is a matrix product, which oneDNN computes faster than the convolution.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from emanet_triton.kernels import flops
from emanet_triton.kernels.checks import check_dtype
from emanet_triton.kernels.conv.eager import out_shape, torch_conv
from emanet_triton.kernels.conv.packed import kept
from emanet_triton.kernels.device import cpu_capability, has_onednn
from emanet_triton.kernels.products import onednn_linear
from emanet_triton.kernels.registration import Operator, register

# Where copies of weights are kept. Elsewhere they would save 1.5% of a network's time and take as
# much memory as the weights.
PACKS = {("amx", torch.bfloat16)}
CACHE_BYTES = 3 * 2**19  # for k rows of a block; a core of a CPU with AMX has 2 MB of cache
BLOCK_ROWS = 32  # of outputs: the memory of a block is small, and the next block uses it again
# From so many input channels on, oneDNN's layout for a 3x3 weight depends on the size of the image.
# A product with another layout takes half a second longer, and a new copy 14 ms.
CHANNELS_OF_MANY_LAYOUTS = 2048


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU multiplies ``dtype``: float32 where oneDNN lacks it."""
    return dtype if has_onednn(dtype) else torch.float32


@torch.no_grad()
def conv_bias_act_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
) -> Tensor:
    """Convolve, add bias and residual and apply ReLU, in the residual's memory if possible.

    Args:
        x: [B, C, H, W] on the CPU, channels-last; float32, float16 or bfloat16. If oneDNN does not
            multiply the dtype at full speed, it multiplies float32, and the result is rounded.
        weight: [O, C, k, k], k odd, in the dtype of ``x``. The padding is ``dilation * (k // 2)``.
        bias: [O], in the dtype of ``x``.
        residual: [B, O, ceil(H / stride), ceil(W / stride)], in the dtype of ``x``; overwritten
            with the result if it is channels-last.
        stride, dilation: at least 1.
        relu: whether negative values become zero.

    Returns:
        [B, O, ceil(H / stride), ceil(W / stride)], channels-last: ``residual`` or a new tensor.
        No gradient flows through it.

    Raises:
        ValueError: the residual has another dtype than ``x``.
    """
    if residual is None:
        return torch.ops.emanet_triton.conv_cpu(x, weight, bias, stride, dilation, relu)
    check_dtype("residual", residual.dtype, (x.dtype,), like="x")
    residual = residual.contiguous(memory_format=torch.channels_last)
    torch.ops.emanet_triton.conv_cpu_add_(residual, x, weight, bias, stride, dilation, relu)
    return residual


def _geometry(weight: Tensor, stride: int, dilation: int) -> tuple[list[int], list[int], list[int]]:
    padding = dilation * (weight.shape[2] // 2)
    return [padding] * 2, [stride] * 2, [dilation] * 2


def _keeps_copies(dtype: torch.dtype) -> bool:
    return (cpu_capability(), dtype) in PACKS


def _packed(weight: Tensor, x: Tensor, geometry: tuple[list[int], ...]) -> Tensor:
    """The weight in oneDNN's layout if copies are kept, else the weight itself."""
    if not _keeps_copies(weight.dtype) or weight.is_inference():
        return weight
    _, channels, size, _ = weight.shape
    varies = size > 1 and channels >= CHANNELS_OF_MANY_LAYOUTS
    reorder = torch.ops.aten.mkldnn_reorder_conv2d_weight
    return kept(
        weight,
        x.shape if varies else None,
        lambda: reorder(weight.to_mkldnn(), *geometry, 1, list(x.shape)),
    )


def _run(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int, relu: bool) -> Tensor:
    if not has_onednn(torch.float32):
        return torch_conv(x, weight, bias, None, stride, dilation, relu, x.dtype, "ieee")
    dtype = compute_dtype(x.dtype)
    geometry = _geometry(weight, stride, dilation)
    by_onednn = relu and _may_apply_relu(x.dtype)
    activation = "relu" if by_onednn else "none"
    if _widens(weight, stride):
        rows, matrix = x.permute(0, 2, 3, 1), weight.flatten(1)
        out = onednn_linear(rows, matrix, bias, activation)
        return out.permute(0, 3, 1, 2)
    packed = _packed(weight.to(dtype), x, geometry)

    def convolve(x: Tensor) -> Tensor:
        operands = _channels_last(x.to(dtype)), packed, bias.to(dtype), *geometry
        out = torch.ops.mkldnn._convolution_pointwise(*operands, 1, activation, [], "")
        return out.relu_() if relu and not by_onednn else out

    columns = _columns(x, weight, stride)
    if columns >= x.shape[3]:
        return convolve(x).to(x.dtype)
    out = _fake(x, weight, bias, stride, dilation, relu)
    (margin, _), *_ = geometry
    for read_h, write_h, inner_h in _blocks(x.shape[2], BLOCK_ROWS, margin):
        for read_w, write_w, inner_w in _blocks(x.shape[3], columns, margin):
            block = x[:, :, read_h, read_w].contiguous(memory_format=torch.channels_last)
            out[:, :, write_h, write_w] = convolve(block)[:, :, inner_h, inner_w]
    return out


def _may_apply_relu(dtype: torch.dtype) -> bool:
    """Whether oneDNN may apply a ReLU to the result of images of this dtype.

    oneDNN's ReLU turns NaN into 0. float16 overflows, and infinity minus infinity is NaN, which has
    to reach the logits: there it is found. The other dtypes hardly overflow: NaN comes from damaged
    weights, which ``fuse`` refuses, or from an image, where a fused network looks for it.
    """
    return dtype != torch.float16


def _channels_last(x: Tensor) -> Tensor:
    """x, or a copy, with strides that no other layout has.

    With one channel or one pixel, a tensor has both layouts at once. oneDNN then takes the other
    one, in which it cannot add bfloat16.
    """
    _, channels, _, width = x.shape
    if x.stride()[1:] == (1, width * channels, channels):
        return x
    return x.clone(memory_format=torch.channels_last)


def _widens(weight: Tensor, stride: int) -> bool:
    """Whether a convolution is a product to more channels, where copies of weights are kept."""
    outputs, channels, size, _ = weight.shape
    is_product = size == stride == 1
    return is_product and outputs > channels and _keeps_copies(weight.dtype)


def _columns(x: Tensor, weight: Tensor, stride: int) -> int:
    """How many columns of an image are convolved at once."""
    size = weight.shape[2]
    if not _keeps_copies(x.dtype) or size == 1 or stride > 1:
        return x.shape[3]
    return max(CACHE_BYTES // (size * x.shape[1] * x.dtype.itemsize) // 16 * 16, 16)


def _blocks(size: int, block: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the input of each block, of the output, and of the block's own output."""
    for first in range(0, size, block):
        last, begin = min(first + block, size), max(first - margin, 0)
        inner = slice(first - begin, last - begin)
        yield slice(begin, min(last + margin, size)), slice(first, last), inner


def _run_add_(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    dilation: int,
    relu: bool,
) -> None:
    if not has_onednn(torch.float32):
        arguments = x, weight, bias, residual, stride, dilation, relu, x.dtype, "ieee"
        residual.copy_(torch_conv(*arguments))
        return
    dtype = compute_dtype(x.dtype)
    geometry = _geometry(weight, stride, dilation)
    by_onednn = relu and _may_apply_relu(x.dtype)
    activation = "relu" if by_onednn else None
    packed = _packed(weight.to(dtype), x, geometry)
    operands = _channels_last(x.to(dtype)), packed, bias.to(dtype)
    total = _channels_last(residual.to(dtype))
    torch.ops.mkldnn._convolution_pointwise_.binary(
        total, *operands, *geometry, 1, "add", 1.0, activation, [], None
    )
    if relu and not by_onednn:
        total.relu_()
    if total is not residual:
        residual.copy_(total)


def _fake(x, weight, bias, stride, dilation, relu) -> Tensor:
    shape = out_shape(x, weight, stride)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


register(
    __name__,
    Operator("conv_cpu", _run, _fake, "CPU", flops=flops.first_convolution),
    Operator(
        "conv_cpu_add_",
        _run_add_,
        lambda *_: None,
        "CPU",
        mutates=("residual",),
        flops=lambda residual, x, weight, *_, **__: flops.convolution(residual, weight),
    ),
)
