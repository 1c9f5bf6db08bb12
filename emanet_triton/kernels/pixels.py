"""The normalisation of pixels in Triton: one pass from bytes to the network's input."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.launch import cdiv
from emanet_triton.kernels.relaunch import start
from emanet_triton.kernels.tape import taped

BLOCK, NUM_WARPS = 4096, 8  # a thread has 16 bytes of pixels


@triton.jit
def normalise_kernel(
    pixels_ptr, out_ptr, num_bytes, mean_0, mean_1, mean_2, std_0, std_1, std_2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(pixel - mean) / std of a run of bytes, of three channels in turn.

    Difference and quotient are rounded to float32, the result once more to the dtype of out: these
    are the bits that PyTorch's operations give.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < num_bytes - first
    b_pixel = tl.load(pixels_ptr + first + o_n, mask=m_n, other=0).to(tl.float32)
    o_c = ((first % 3).to(tl.int32) + o_n) % 3
    b_mean = tl.where(o_c == 0, mean_0, tl.where(o_c == 1, mean_1, mean_2))
    b_std = tl.where(o_c == 0, std_0, tl.where(o_c == 1, std_1, std_2))
    b_out = tl.div_rn(b_pixel - b_mean, b_std)
    tl.store(out_ptr + first + o_n, b_out.to(out_ptr.dtype.element_ty), mask=m_n)


INTERPRETED = not isinstance(normalise_kernel, triton.JITFunction)


@taped
def normalise(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """uint8 [B, H, W, 3] → [B, 3, H, W] in ``dtype``, channels-last; three means and deviations."""
    pixels = pixels.contiguous()
    out = torch.empty_like(pixels, dtype=dtype)
    if pixels.numel():
        constants = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": False}
        arguments = pixels, out, pixels.numel(), *map(float, mean), *map(float, std)
        start(normalise_kernel, (cdiv(pixels.numel(), BLOCK),), arguments, constants)
    return out.permute(0, 3, 1, 2)
