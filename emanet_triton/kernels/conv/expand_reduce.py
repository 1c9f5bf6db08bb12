"""Two 1x1 convolutions in a row in one Triton kernel: the last of a residual block, which expands
the channels and adds the identity, and the first of the next block, which reduces them again.

The output of the first convolution is written, because it is the next block's identity. The second
convolution does not read it: each part of it goes from registers into the second product, rounded
to the images' dtype as separate convolutions round it. Images are NHWC in memory, so they are
matrices of pixels and channels.

Index letters: m pixel of a tile, p input channel, o expanded channel, r reduced channel.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.kernels.conv import tiles
from emanet_triton.kernels.conv.implicit_gemm import nhwc
from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.launch import cdiv, fitting, launch, with_fitting_tiles
from emanet_triton.kernels.tape import taped


@triton.jit
def load_tile(
    source, row, column, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of a matrix [num_rows, WIDTH]; rows outside are zero."""
    if DESCRIPTORS:
        b = source.load([row, column])
    else:
        # One 64-bit base and 32-bit offsets, as in ``load_sums``.
        o_row, o_column = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
        p = source + tl.cast(row, tl.int64) * WIDTH + (o_row * WIDTH + o_column)
        b = tl.load(p, mask=o_row < num_rows - row, other=0.0)
    return b


@triton.jit
def store_tile(target, row, column, b, num_rows, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Write ``b`` into a matrix [num_rows, WIDTH], without its rows outside."""
    if DESCRIPTORS:
        target.store([row, column], b)
    else:
        o_row = tl.arange(0, b.shape[0])[:, None]
        o_column = column + tl.arange(0, b.shape[1])[None, :]
        p = target + tl.cast(row, tl.int64) * WIDTH + (o_row * WIDTH + o_column)
        tl.store(p, b, mask=o_row < num_rows - row)


@triton.jit
def conv_expand_reduce(
    x, expand, expand_bias_ptr, reduce, reduce_bias_ptr, residual, out, reduced,
    num_pixels,
    OUT: tl.constexpr, DESCRIPTORS: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Compute both outputs of BLOCK_M pixels, BLOCK_O expanded channels at a time.

    x [pixels, P], expand [OUT, P], reduce [R, OUT], residual and out [pixels, OUT] and reduced
    [pixels, R] are tensor descriptors, or pointers where there are none. The tile of x stays in
    shared memory, the sums of R channels stay in registers.
    """
    first = tl.program_id(0) * BLOCK_M
    o_r = tl.arange(0, R)
    b_x = load_tile(x, first, 0, num_pixels, P, BLOCK_M, P, DESCRIPTORS)
    b_reduced = tl.zeros([BLOCK_M, R], tl.float32)
    # Without num_stages the residual, which is no operand of a product, would not be prefetched.
    for o in tl.range(0, OUT, BLOCK_O, num_stages=STAGES):
        b_bias = tl.load(expand_bias_ptr + o + tl.arange(0, BLOCK_O)).to(tl.float32)
        b_expand = load_tile(expand, o, 0, OUT, P, BLOCK_O, P, DESCRIPTORS)
        b_reduce = load_tile(reduce, 0, o, R, OUT, R, BLOCK_O, DESCRIPTORS)
        b_residual = load_tile(residual, first, o, num_pixels, OUT, BLOCK_M, BLOCK_O, DESCRIPTORS)
        b_out = b_residual.to(tl.float32) + b_bias[None, :]
        b_out = tl.dot(b_x, b_expand.T, b_out)
        b_out = tl.where(b_out < 0.0, 0.0, b_out).to(b_x.dtype)  # a NaN stays NaN
        store_tile(out, first, o, b_out, num_pixels, OUT, DESCRIPTORS)
        b_reduced = tl.dot(b_out, b_reduce.T, b_reduced)
    b_reduced += tl.load(reduce_bias_ptr + o_r).to(tl.float32)[None, :]
    b_reduced = tl.where(b_reduced < 0.0, 0.0, b_reduced).to(b_x.dtype)
    store_tile(reduced, first, 0, b_reduced, num_pixels, R, DESCRIPTORS)


@taped
@with_fitting_tiles
def expand_reduce(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor,
    arch: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B, P, H, W], residual [B, O, H, W] → [B, O, H, W] and [B, R, H, W], channels-last."""
    arch = arch or gpu_arch(x.device)
    batch, planes, height, width = x.shape
    x, residual, expand, reduce = map(_matrix, (x, residual, *weights))
    expand_bias, reduce_bias = (bias.contiguous() for bias in biases)
    outputs, reduced_channels = reduce.shape[::-1]
    tile = tiles.expand_reduce_tile(arch, DTYPE_NAMES[x.dtype], planes, reduced_channels)
    tile = fitting(tile, x.device)
    out, reduced = x.new_empty(len(x), outputs), x.new_empty(len(x), reduced_channels)

    block_m, block_o = tile.meta["BLOCK_M"], tile.meta["BLOCK_O"]
    descriptors = arch in tiles.DESCRIPTOR_ARCHS

    def described(matrix: Tensor, *block: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, list(block)) if descriptors else matrix

    launch(
        conv_expand_reduce, tile, x.device, cdiv(len(x), block_m),
        described(x, block_m, planes),
        described(expand, block_o, planes), expand_bias,
        described(reduce, reduced_channels, block_o), reduce_bias,
        described(residual, block_m, block_o),
        described(out, block_m, block_o),
        described(reduced, block_m, reduced_channels),
        len(x), OUT=outputs, DESCRIPTORS=descriptors, STAGES=tile.pipeline_stages,
    )  # fmt: skip
    return _images(out, batch, height, width), _images(reduced, batch, height, width)


def _matrix(image: Tensor) -> Tensor:
    """[B, C, H, W] → [B * H * W, C], contiguous and aligned as tensor descriptors need it."""
    matrix = nhwc(image).view(-1, image.shape[1])
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _images(matrix: Tensor, batch: int, height: int, width: int) -> Tensor:
    """[B * H * W, C] → [B, C, H, W], channels-last."""
    return matrix.view(batch, height, width, -1).permute(0, 3, 1, 2)


INTERPRETED = not isinstance(conv_expand_reduce, triton.JITFunction)
