"""Convolution as an implicit matrix product in Triton, with bias, residual and ReLU.

Images are NHWC in memory and weights [O, taps * C]. One program computes BLOCK_O channels of
BLOCK_M output pixels and loops over taps and input channels. ``conv_rows`` reads tiles of an image
row through tensor descriptors, which give zeros outside the image: the padding. ``conv_pointers``
takes any size, stride and number of channels. ``conv_taps`` has no loop: it takes all channels of
all taps at once, where these are few. Sums, bias, residual and ReLU are float32.

Index letters: b image, m output pixel of a tile, c input channel, o output channel, k channel of a
tap, tap * C + c.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.kernels.conv import tiles
from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.launch import cdiv, fitting, launch, with_fitting_tiles
from emanet_triton.kernels.tape import taped

# If an image's rows fill a smaller share of their tiles, ``conv_pointers`` runs.
_MIN_FILLED = 0.8

_MOST_SUMMED = 64  # channels of all taps together, up to which ``conv_taps`` runs


@triton.jit
def load_sums(
    bias_ptr, residual_ptr, first, m_m, o_o,
    OUT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Bias plus residual, float32 [BLOCK_M, BLOCK_O], to which the products are added.

    To add them after the products would need the registers of a second tile. ``first`` is the
    output pixel of row 0; the pixels of the other rows follow it.
    """
    m_o = o_o < OUT
    b_bias = tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
    b_out = tl.broadcast_to(b_bias[None, :], [BLOCK_M, o_o.shape[0]])
    if HAS_RESIDUAL:
        # One 64-bit base and 32-bit offsets, because 64-bit offsets of a whole tile spill.
        o_out = tl.arange(0, BLOCK_M)[:, None] * OUT + o_o[None, :]
        p_residual = residual_ptr + first.to(tl.int64) * OUT + o_out
        b_residual = tl.load(p_residual, mask=m_m[:, None] & m_o[None, :], other=0.0)
        b_out += b_residual.to(tl.float32)
    return b_out


@triton.jit
def store_outputs(b_out, out_ptr, first, m_m, o_o, OUT: tl.constexpr, RELU: tl.constexpr):
    """Cast float32 sums [BLOCK_M, BLOCK_O] of the pixels from ``first`` on, and store them."""
    if RELU:
        b_out = tl.where(b_out < 0.0, 0.0, b_out)  # a NaN stays NaN, as in torch.relu
    o_out = tl.arange(0, b_out.shape[0])[:, None] * OUT + o_o[None, :]
    p_out = out_ptr + first.to(tl.int64) * OUT + o_out
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & (o_o < OUT)[None, :])


@triton.jit
def conv_rows(
    x_desc, weight_desc, bias_ptr, residual_ptr, out_ptr,
    H, W, num_tiles,
    C: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M pixels of one row of the output [B, H, W, O]; C is a multiple of BLOCK_C.

    x is [B, H, W, C]. For stride 2 it is [B, H, 2, W, 2 * C], which separates even and odd rows and
    columns.
    """
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    o_first = pid % num_blocks * BLOCK_O
    x_first = pid // num_blocks % num_tiles * BLOCK_M
    i_row = pid // num_blocks // num_tiles
    i_b, y = i_row // H, i_row % H

    o_x = x_first + tl.arange(0, BLOCK_M)
    o_o = o_first + tl.arange(0, BLOCK_O)
    first = i_row * W + x_first
    b_out = load_sums(bias_ptr, residual_ptr, first, o_x < W, o_o, OUT, HAS_RESIDUAL, BLOCK_M)
    for k in range(0, KERNEL * KERNEL * C, BLOCK_C):
        tap, c = k // C, k % C
        dy = (tap // KERNEL - KERNEL // 2) * DILATION
        dx = (tap % KERNEL - KERNEL // 2) * DILATION
        if STRIDE == 1:
            b_x = x_desc.load([i_b, y + dy, x_first + dx, c])
        else:
            b_x = x_desc.load([i_b, y + (dy >> 1), dy & 1, x_first + (dx >> 1), (dx & 1) * C + c])
        b_weight = weight_desc.load([o_first, k])  # [BLOCK_O, BLOCK_C]
        b_x = b_x.reshape(BLOCK_M, BLOCK_C)
        b_out = tl.dot(b_x, b_weight.T, b_out, input_precision=PRECISION)
    store_outputs(b_out, out_ptr, first, o_x < W, o_o, OUT, RELU)


@triton.jit
def conv_pointers(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    H_IN, W_IN, H, W, num_pixels,
    C: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M of the B * H * W pixels of the output; x is [B, H_IN, W_IN, C]."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    C_PADDED: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * BLOCK_C
    o_o = pid % num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    first = pid // num_blocks * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    m_m, m_o = o_m < num_pixels, o_o < OUT
    o_x, o_y, o_b = o_m % W * STRIDE, o_m // W % H * STRIDE, o_m // W // H
    p_weight = weight_ptr + (o_o * (KERNEL * KERNEL * C))[None, :]

    b_out = load_sums(bias_ptr, residual_ptr, first, m_m, o_o, OUT, HAS_RESIDUAL, BLOCK_M)
    for k in range(0, KERNEL * KERNEL * C_PADDED, BLOCK_C):
        tap, c = k // C_PADDED, tl.multiple_of(k % C_PADDED, BLOCK_C)  # for wide loads
        o_c = c + tl.arange(0, BLOCK_C)
        x = o_x + (tap % KERNEL - KERNEL // 2) * DILATION
        y = o_y + (tap // KERNEL - KERNEL // 2) * DILATION
        m_x = (m_m & (x >= 0) & (x < W_IN) & (y >= 0) & (y < H_IN))[:, None]
        m_w = m_o[None, :]
        if C_PADDED != C:
            m_x &= (o_c < C)[None, :]
            m_w &= (o_c < C)[:, None]
        p_x = x_ptr + ((o_b * H_IN + y) * W_IN + x).to(tl.int64)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_C]
        b_weight = tl.load(p_weight + (tap * C + o_c)[:, None], mask=m_w, other=0.0)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)
    store_outputs(b_out, out_ptr, first, m_m, o_o, OUT, RELU)


@triton.jit
def conv_taps(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    H_IN, W_IN, H, W, num_pixels,
    C: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, HAS_RESIDUAL: tl.constexpr, RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``conv_pointers`` with one product: its summed axis k is all channels of all taps."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    K: tl.constexpr = KERNEL * KERNEL * C
    BLOCK_K: tl.constexpr = max(16, triton.next_power_of_2(K))
    o_o = pid % num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    first = pid // num_blocks * BLOCK_M

    # A list of all elements, pixels first, because versions of Triton order the axes of a block
    # differently. Thus a warp loads one channel of one tap of neighbouring pixels, and a thread
    # has one pixel, or few: tap, channel and their offsets are constants.
    o = tl.arange(0, BLOCK_K * BLOCK_M)
    o_m, o_k = first + o % BLOCK_M, o // BLOCK_M
    o_x, o_y, o_b = o_m % W * STRIDE, o_m // W % H * STRIDE, o_m // W // H
    tap, o_c = o_k // C, o_k % C
    dx = (tap % KERNEL - KERNEL // 2) * DILATION
    dy = (tap // KERNEL - KERNEL // 2) * DILATION
    x, y = o_x + dx, o_y + dy
    m_x = (o_k < K) & (o_m < num_pixels) & (x >= 0) & (x < W_IN) & (y >= 0) & (y < H_IN)
    p_pixel = x_ptr + ((o_b * H_IN + o_y) * W_IN + o_x).to(tl.int64) * C
    b_x = tl.load(p_pixel + (dy.to(tl.int64) * W_IN + dx) * C + o_c, mask=m_x, other=0.0)
    b_x = b_x.reshape(BLOCK_K, BLOCK_M)

    o_k = tl.arange(0, BLOCK_K)
    p_weight = weight_ptr + (o_o * K)[None, :] + o_k[:, None]
    b_weight = tl.load(p_weight, mask=(o_k < K)[:, None] & (o_o < OUT)[None, :], other=0.0)

    m_m = first + tl.arange(0, BLOCK_M) < num_pixels
    b_out = load_sums(bias_ptr, residual_ptr, first, m_m, o_o, OUT, HAS_RESIDUAL, BLOCK_M)
    b_out = tl.dot(b_x.T, b_weight, b_out, input_precision=PRECISION)
    store_outputs(b_out, out_ptr, first, m_m, o_o, OUT, RELU)


def nhwc(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H, W, C], contiguous; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


@taped
@with_fitting_tiles
def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    dilation: int,
    relu: bool,
    out_dtype: torch.dtype,
    precision: str,
    arch: str | None = None,
) -> Tensor:
    """x [B, C, H, W] → [B, O, ceil(H / stride), ceil(W / stride)], channels-last."""
    _check_pixels(x.shape)
    arch = arch or gpu_arch(x.device)
    x, weight, bias = nhwc(x), nhwc(weight), bias.contiguous()
    residual = None if residual is None else nhwc(residual)
    batch, height, width, channels = x.shape
    outputs, kernel, _, _ = weight.shape
    height, width = cdiv(height, stride), cdiv(width, stride)
    out = x.new_empty(batch, height, width, outputs, dtype=out_dtype)

    aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    name, image = "conv_pointers", None
    if channels % 16 and kernel * kernel * channels <= _MOST_SUMMED:
        name = "conv_taps"
    elif aligned and arch in tiles.DESCRIPTOR_ARCHS:
        image = _row_view(x, kernel, stride)
        name = name if image is None else "conv_rows"
    tile = tiles.tile(
        name, arch, DTYPE_NAMES[x.dtype], channels, outputs, batch * height * width, precision,
        None if residual is None else DTYPE_NAMES[residual.dtype],
        image is not None and kernel == stride == 1,
    )  # fmt: skip
    tile = fitting(tile, x.device)
    constants = {
        "C": channels, "OUT": outputs, "KERNEL": kernel, "STRIDE": stride, "DILATION": dilation,
        "HAS_RESIDUAL": residual is not None, "RELU": relu,
    }  # fmt: skip
    if image is None:
        function = conv_taps if name == "conv_taps" else conv_pointers
        _launch_pointers(function, tile, x, weight, bias, residual, out, **constants)
    else:
        _launch_rows(tile, image, weight.view(outputs, -1), bias, residual, out, **constants)
    return out.permute(0, 3, 1, 2)


def _check_pixels(shape: torch.Size) -> None:
    """The kernels number the pixels of a batch in 32 bits."""
    pixels = shape[0] * shape[2] * shape[3]
    if pixels >= 2**31:
        raise ValueError(f"backend 'triton' takes fewer than 2**31 pixels at once, got {pixels}")


def _row_view(x: Tensor, kernel: int, stride: int) -> Tensor | None:
    """x [B, H, W, C] as ``conv_rows`` reads it, or None if ``conv_pointers`` should run."""
    batch, height, width, channels = x.shape
    if x.dtype == torch.float32 or channels % 64:
        return None
    if stride == 2:
        if height % 2 or width % 2:
            return None
        x = x.view(batch, height // 2, 2, width // 2, 2 * channels)
    elif kernel == 1:
        return x.view(1, 1, -1, channels)
    width //= stride
    tiled = cdiv(width, tiles.ROW) * tiles.ROW
    if width < _MIN_FILLED * tiled:
        return None
    # An axis of length 1 may have any stride. A descriptor takes multiples of 16 bytes only.
    return x.view(-1).view(x.shape)


def _launch_rows(tile, image, weight, bias, residual, out, **constants) -> None:
    block_m, block_o, block_c = (tile.meta[f"BLOCK_{letter}"] for letter in "MOC")
    batch, height, width = image.shape[0], image.shape[1], image.shape[-2]
    num_tiles = cdiv(width, block_m)
    image_block = [1] * (image.dim() - 2) + [block_m, block_c]
    launch(
        conv_rows, tile, out.device, batch * height * num_tiles * cdiv(constants["OUT"], block_o),
        TensorDescriptor.from_tensor(image, image_block),
        TensorDescriptor.from_tensor(weight, [block_o, block_c]),
        bias, residual, out, height, width, num_tiles, **constants,
    )  # fmt: skip


def _launch_pointers(kernel, tile, x, weight, bias, residual, out, **constants) -> None:
    batch, height, width, outputs = out.shape
    pixels = batch * height * width
    programs = cdiv(pixels, tile.meta["BLOCK_M"])
    launch(
        kernel, tile, out.device, programs * cdiv(outputs, tile.meta["BLOCK_O"]),
        x, weight, bias, residual, out,
        x.shape[1], x.shape[2], height, width, pixels, **constants,
    )  # fmt: skip


INTERPRETED = not isinstance(conv_rows, triton.JITFunction)
