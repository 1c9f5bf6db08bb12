"""Maximum pooling of 3x3 pixels at stride 2, in Triton.

Images are NHWC in memory. Neighbouring outputs share most of their pixels, so a program computes a
rectangle of them: its loads find the shared pixels in the L1 cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.launch import cdiv, launch
from emanet_triton.kernels.pool import tiles
from emanet_triton.kernels.tape import taped


@triton.jit
def max_pool_kernel(
    x_ptr, out_ptr, H_IN, W_IN, H, W, num_rows, num_columns,
    C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_Y times BLOCK_X pixels of BLOCK_C channels of an output [B, H, W, C].

    x is [B, H_IN, W_IN, C]. An image has num_rows times num_columns of these rectangles.
    """
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_c, i_tile = pid % num_blocks, pid // num_blocks
    i_x, i_y = i_tile % num_columns, i_tile // num_columns % num_rows
    i_b = (i_tile // num_columns // num_rows).to(tl.int64)
    x_ptr += i_b * H_IN * W_IN * C
    out_ptr += i_b * H * W * C
    o_m = tl.arange(0, BLOCK_Y * BLOCK_X)
    o_y, o_x = i_y * BLOCK_Y + o_m // BLOCK_X, i_x * BLOCK_X + o_m % BLOCK_X
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = (o_c < C)[None, :]

    # A window that reaches beyond the image has the pixel at the edge twice, in the place of the
    # padding: that changes no maximum, and no load needs a mask of pixels.
    b_out = tl.full([BLOCK_Y * BLOCK_X, BLOCK_C], float("-inf"), x_ptr.dtype.element_ty)
    for tap in tl.static_range(9):
        y = tl.minimum(tl.maximum(2 * o_y + (tap // 3 - 1), 0), H_IN - 1)
        x = tl.minimum(tl.maximum(2 * o_x + (tap % 3 - 1), 0), W_IN - 1)
        p_x = x_ptr + (y.to(tl.int64) * W_IN + x)[:, None] * C + o_c[None, :]
        b_x = tl.load(p_x, mask=m_c)  # [BLOCK_Y * BLOCK_X, BLOCK_C]
        b_out = tl.maximum(b_out, b_x, propagate_nan=tl.PropagateNan.ALL)
    m_out = ((o_y < H) & (o_x < W))[:, None] & m_c
    p_out = out_ptr + (o_y.to(tl.int64) * W + o_x)[:, None] * C + o_c[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_out)


@taped
def max_pool(x: Tensor, arch: str | None = None) -> Tensor:
    """x [B, C, H, W] → [B, C, ceil(H / 2), ceil(W / 2)], channels-last."""
    tile = tiles.tile(arch or gpu_arch(x.device), DTYPE_NAMES[x.dtype])
    x = x.permute(0, 2, 3, 1).contiguous()
    batch, height_in, width_in, channels = x.shape
    height, width = cdiv(height_in, 2), cdiv(width_in, 2)
    out = x.new_empty(batch, height, width, channels)
    sides = zip((height, width, channels), ("BLOCK_Y", "BLOCK_X", "BLOCK_C"), strict=True)
    rows, columns, blocks = (cdiv(side, tile.meta[block]) for side, block in sides)
    launch(
        max_pool_kernel, tile, x.device, batch * rows * columns * blocks,
        x, out, height_in, width_in, height, width, rows, columns, C=channels,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)


INTERPRETED = not isinstance(max_pool_kernel, triton.JITFunction)
