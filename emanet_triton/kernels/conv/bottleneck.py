"""A whole bottleneck of layers 1 and 2 in one Triton kernel: 1x1, 3x3, 1x1, residual.

The kernel writes only the output to memory. Images are NHWC in memory and weights [O, taps * C],
as in ``implicit_gemm``. The outputs of the first two convolutions are rounded to the images' dtype,
as separate convolutions round them.

Index letters: m pixel of a tile, c input channel, p channel of the 3x3, o output channel.
"""

import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.conv import tiles
from emanet_triton.kernels.conv.implicit_gemm import nhwc
from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.launch import cdiv, fitting, launch, with_fitting_tiles


@triton.jit
def shift_rows(b_x, shift: tl.constexpr):
    """[M, P] → row m holds what row m + shift held; the ends repeat."""
    M: tl.constexpr = b_x.shape[0]
    o_m = tl.minimum(tl.maximum(tl.arange(0, M) + shift, 0), M - 1)
    return tl.gather(b_x, tl.broadcast_to(o_m[:, None], b_x.shape), axis=0)


@triton.jit
def conv_bottleneck(
    x_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr,
    residual_ptr, out_ptr,
    H, W, num_pixels,
    C: tl.constexpr, P: tl.constexpr, OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the output of BLOCK_M - 2 of the B * H * W pixels.

    The tile's first and last pixel have no output, because the tile lacks one of their neighbours.
    The first 1x1 is computed anew for each of the three rows that the 3x3 needs. The nine taps are
    summed by column; at the end the sums of the left and the right column are shifted by a pixel.
    """
    first = tl.program_id(0) * (BLOCK_M - 2) - 1
    o_m = first + tl.arange(0, BLOCK_M)
    o_x, o_y = o_m % W, o_m // W % H
    o_p = tl.arange(0, P)
    element = x_ptr.dtype.element_ty
    b_bias = tl.load(bias1_ptr + o_p).to(tl.float32)

    b_left = tl.zeros([BLOCK_M, P], tl.float32)
    b_mid = tl.zeros([BLOCK_M, P], tl.float32)
    b_right = tl.zeros([BLOCK_M, P], tl.float32)
    for i in range(3):
        dy = i - 1
        # Outside the image any pixel is read; below, zero (the padding) replaces its result.
        o_in = tl.minimum(tl.maximum(o_m + dy * W, 0), num_pixels - 1).to(tl.int64)
        b_h = tl.zeros([BLOCK_M, P], tl.float32)
        for c in range(0, C, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            b_x = tl.load(x_ptr + o_in[:, None] * C + o_c[None, :])
            b_weight = tl.load(weight1_ptr + o_p[None, :] * C + o_c[:, None])
            b_h = tl.dot(b_x, b_weight, b_h)
        b_h += b_bias[None, :]
        m_h = ((o_y + dy >= 0) & (o_y + dy < H))[:, None] & ~(b_h < 0.0)
        b_h = tl.where(m_h, b_h, 0.0).to(element)  # [BLOCK_M, P]
        p_weight = weight2_ptr + o_p[None, :] * (9 * P) + (i * 3 * P + o_p)[:, None]
        b_left = tl.dot(b_h, tl.load(p_weight), b_left)
        b_mid = tl.dot(b_h, tl.load(p_weight + P), b_mid)
        b_right = tl.dot(b_h, tl.load(p_weight + 2 * P), b_right)
    b_mid += tl.where((o_x > 0)[:, None], shift_rows(b_left, -1), 0.0)
    b_mid += tl.where((o_x < W - 1)[:, None], shift_rows(b_right, 1), 0.0)
    b_mid += tl.load(bias2_ptr + o_p).to(tl.float32)[None, :]
    b_h = tl.where(b_mid < 0.0, 0.0, b_mid).to(element)

    m_out = (o_m > first) & (o_m < tl.minimum(first + BLOCK_M - 1, num_pixels))
    o_row = (o_m.to(tl.int64) * OUT)[:, None]
    for o in range(0, OUT, BLOCK_O):
        o_o = o + tl.arange(0, BLOCK_O)
        b_weight = tl.load(weight3_ptr + o_o[None, :] * P + o_p[:, None])
        b_residual = tl.load(residual_ptr + o_row + o_o[None, :], mask=m_out[:, None], other=0.0)
        b_out = tl.load(bias3_ptr + o_o).to(tl.float32)[None, :] + b_residual.to(tl.float32)
        b_out = tl.dot(b_h, b_weight, b_out)
        b_out = tl.where(b_out < 0.0, 0.0, b_out).to(element)
        tl.store(out_ptr + o_row + o_o[None, :], b_out, mask=m_out[:, None])


@with_fitting_tiles
def bottleneck(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor,
    arch: str | None = None,
) -> Tensor:
    """x [B, C, H, W], residual [B, O, H, W] → [B, O, H, W], channels-last."""
    x, residual = nhwc(x), nhwc(residual)
    batch, height, width, channels = x.shape
    outputs, planes = residual.shape[3], weights[0].shape[0]
    tile = tiles.bottleneck_tile(arch or gpu_arch(x.device), DTYPE_NAMES[x.dtype], planes)
    tile = fitting(tile, x.device)
    out = x.new_empty(residual.shape)
    parameters = [
        tensor for pair in zip(map(nhwc, weights), biases, strict=True) for tensor in pair
    ]
    pixels = batch * height * width
    launch(
        conv_bottleneck, tile, x.device, cdiv(pixels, tile.meta["BLOCK_M"] - 2),
        x, *parameters, residual, out, height, width, pixels, C=channels, OUT=outputs,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


INTERPRETED = not isinstance(conv_bottleneck, triton.JITFunction)
