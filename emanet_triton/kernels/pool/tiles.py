"""Tile sizes of the pooling kernel by GPU architecture and dtype, chosen without timing."""

import functools

from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.tile import ARCHS, Tile

# BLOCK_Y, BLOCK_X, BLOCK_C, warps by (arch, dtype); "half" stands for bf16 and fp16. BLOCK_C is 128
# bytes, a cache line. A thread has 16 bytes of outputs: with more, the compiler starts fewer of its
# loads before it waits for the first. A program of four rows reads nine rows of pixels; eight are
# its share of the image.
_SIZES = {
    ("sm_80", "half"): (4, 8, 64, 8),
    ("sm_80", "fp32"): (4, 8, 32, 8),
    ("sm_90", "half"): (4, 8, 64, 8),
    ("sm_90", "fp32"): (4, 8, 32, 8),
    ("sm_100", "half"): (4, 8, 64, 8),
    ("sm_100", "fp32"): (4, 8, 32, 8),
    ("gfx942", "half"): (4, 8, 64, 4),
    ("gfx942", "fp32"): (4, 8, 32, 4),
}


@functools.cache
def tile(arch: str, dtype: str) -> Tile:
    """The configuration of ``max_pool_kernel`` for images of a dtype."""
    sizes = _SIZES[arch, "fp32" if dtype == "fp32" else "half"]
    block_y, block_x, block_c, num_warps = sizes
    meta = {"BLOCK_Y": block_y, "BLOCK_X": block_x, "BLOCK_C": block_c}
    return Tile("max_pool_kernel", arch, dtype, meta, num_warps, 1)


SHIPPED = tuple(tile(arch, dtype) for arch in ARCHS for dtype in DTYPES)
