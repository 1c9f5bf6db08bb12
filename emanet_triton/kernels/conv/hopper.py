"""Convolution as an implicit matrix product in Gluon for NVIDIA's Hopper GPUs.

A program of ``conv_boxes`` computes one tile after the other; its warps have three roles. One warp
loads images and weights into a ring of buffers, several steps ahead; so it loads for the next tile
while the last one is finished. Two warp groups multiply, and add bias, residual and ReLU. One warp
stores. A tile is a box of pixels of several images and rows, so the width of an image matters
little. Triton itself gives no roles to warps on these GPUs. Triton's interpreter does not run
Gluon; ``tests/gluon_simulator.py`` does.

Index letters as in ``implicit_gemm``; step: BLOCK_C channels of a tap; n counts steps of a program,
n_out counts slices of SLICE output channels.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from emanet_triton.kernels.conv import tiles
from emanet_triton.kernels.conv.implicit_gemm import nhwc
from emanet_triton.kernels.device import DTYPE_NAMES, multiprocessors
from emanet_triton.kernels.hopper import (
    arrive_together,
    async_load,
    async_store,
    columns,
    described,
)
from emanet_triton.kernels.launch import cdiv, launch
from emanet_triton.kernels.tape import taped

INTERPRETED = False

BLOCK_M = gl.constexpr(tiles.BOX)
BLOCK_C = gl.constexpr(tiles.BOX_CHANNELS)
SLICE = gl.constexpr(tiles.SLICE)


@gluon.jit
def position(tile, grid, x_desc, BLOCK_O: gl.constexpr):
    """First image, row, column and output channel of a tile; first all channels of a box."""
    blocks, columns, rows = grid
    box: gl.constexpr = x_desc.block_shape
    o = tile % blocks * BLOCK_O
    tile = tile // blocks
    x = tile % columns * box[2]
    tile = tile // columns
    return tile // rows * box[0], tile % rows * box[1], x, o


@gluon.jit
def load_tiles(
    x_desc, weight_desc, residual_desc, num_tiles, grid, buffers, barriers,
    KERNEL: gl.constexpr, DILATION: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    C: gl.constexpr, BLOCK_O: gl.constexpr, BUFFERS: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: images and weights, and the residual of a tile.

    The residual is loaded after so many steps as there are buffers: then they are full, and the
    next step has to wait anyway. All of a tile's residual needs buffers at that time. If it had to
    wait for a buffer of the same tile, it would wait for steps that only this warp can load.
    """
    xs, weights, residuals, _ = buffers
    loaded, free, residual_loaded, _, out_free = barriers
    STEPS: gl.constexpr = KERNEL * KERNEL * C // BLOCK_C
    SLICES: gl.constexpr = BLOCK_O // SLICE
    AHEAD: gl.constexpr = min(STEPS, BUFFERS)
    gl.static_assert(not HAS_RESIDUAL or OUTS >= SLICES)
    STEP_BYTES: gl.constexpr = x_desc.block_type.nbytes + weight_desc.block_type.nbytes
    n = 0
    n_out = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_b, y, x, o_first = position(tile, grid, x_desc, BLOCK_O)
        for step in range(STEPS):
            i = n % BUFFERS
            mbarrier.wait(free.index(i), (n // BUFFERS & 1) ^ 1)
            mbarrier.expect(loaded.index(i), STEP_BYTES)
            tap, c = step * BLOCK_C // C, step * BLOCK_C % C
            dy = (tap // KERNEL - KERNEL // 2) * DILATION
            dx = (tap % KERNEL - KERNEL // 2) * DILATION
            # Zeros outside the image: the padding.
            async_load(x_desc, [i_b, y + dy, x + dx, c], loaded.index(i), xs.index(i))
            async_load(weight_desc, [o_first, step * BLOCK_C], loaded.index(i), weights.index(i))
            n += 1
            if HAS_RESIDUAL and step == AHEAD - 1:
                for j in range(SLICES):
                    i = (n_out + j) % OUTS
                    mbarrier.wait(out_free.index(i), ((n_out + j) // OUTS & 1) ^ 1)
                    mbarrier.expect(residual_loaded.index(i), residual_desc.block_type.nbytes)
                    at = [i_b, y, x, o_first + j * SLICE]
                    async_load(residual_desc, at, residual_loaded.index(i), residuals.index(i))
        n_out += SLICES


@gluon.jit
def store_tiles(
    x_desc, out_desc, num_tiles, grid, buffers, barriers,
    BLOCK_O: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """The storing warp."""
    _, _, _, outs = buffers
    _, _, _, out_full, out_free = barriers
    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_b, y, x, o_first = position(tile, grid, x_desc, BLOCK_O)
        for j in range(BLOCK_O // SLICE):
            i = n % OUTS
            mbarrier.wait(out_full.index(i), n // OUTS & 1)
            async_store(out_desc, [i_b, y, x, o_first + j * SLICE], outs.index(i))
            tma.store_wait(0)
            mbarrier.arrive(out_free.index(i))
            n += 1


@gluon.jit
def multiply_tiles(
    bias_ptr, num_tiles, grid, buffers, barriers,
    KERNEL: gl.constexpr, HAS_RESIDUAL: gl.constexpr, RELU: gl.constexpr,
    C: gl.constexpr, OUT: gl.constexpr, BLOCK_O: gl.constexpr, BUFFERS: gl.constexpr,
    OUTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The warp groups that multiply: each has half of the pixels of a tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_O, 16]
    )
    PART: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, SLICE, 16]
    )
    xs, weights, residuals, outs = buffers
    loaded, free, residual_loaded, out_full, out_free = barriers
    STEPS: gl.constexpr = KERNEL * KERNEL * C // BLOCK_C
    o_slice = gl.arange(0, SLICE, gl.SliceLayout(0, PART))
    n = 0
    n_out = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        o_first = tile % grid[0] * BLOCK_O
        b_sum = gl.full([BLOCK_M, BLOCK_O], 0.0, gl.float32, SUMS)
        for step in range(STEPS):
            i = n % BUFFERS
            b_x = xs.index(i).reshape([BLOCK_M, BLOCK_C])
            mbarrier.wait(loaded.index(i), n // BUFFERS & 1)
            b_sum = warpgroup_mma(b_x, weights.index(i).permute([1, 0]), b_sum, is_async=True)
            b_sum = warpgroup_mma_wait(1, deps=[b_sum])  # for the product before
            arrive_together(free.index((n + BUFFERS - 1) % BUFFERS), pred=step > 0)
            n += 1
        b_sum = warpgroup_mma_wait(0, deps=[b_sum])
        arrive_together(free.index((n + BUFFERS - 1) % BUFFERS))
        for j in gl.static_range(BLOCK_O // SLICE):
            i = n_out % OUTS
            o_o = o_first + j * SLICE + o_slice
            b_bias = gl.load(bias_ptr + o_o, mask=o_o < OUT, other=0.0).to(gl.float32)
            b_out = gl.convert_layout(columns(b_sum, j, SLICE), PART) + b_bias[None, :]
            if HAS_RESIDUAL:  # it came after the buffer had become free
                mbarrier.wait(residual_loaded.index(i), n_out // OUTS & 1)
                b_out += residuals.index(i).reshape([BLOCK_M, SLICE]).load(PART).to(gl.float32)
            else:
                mbarrier.wait(out_free.index(i), (n_out // OUTS & 1) ^ 1)
            if RELU:
                b_out = gl.where(b_out < 0.0, 0.0, b_out)  # a NaN stays NaN, as in torch.relu
            outs.index(i).reshape([BLOCK_M, SLICE]).store(b_out.to(outs.dtype))
            fence_async_shared()
            arrive_together(out_full.index(i))
            n_out += 1


@gluon.jit(do_not_specialize=["num_tiles", "columns", "rows"])
def conv_boxes(
    x_desc, weight_desc, bias_ptr, residual_desc, out_desc, num_tiles, columns, rows,
    C: gl.constexpr, OUT: gl.constexpr, KERNEL: gl.constexpr, DILATION: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, RELU: gl.constexpr,
    BLOCK_O: gl.constexpr, BUFFERS: gl.constexpr, OUTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Compute tiles of BLOCK_M pixels and BLOCK_O channels; stride 1, C a multiple of BLOCK_C.

    x [B, H, W, C], in boxes of BLOCK_M pixels and BLOCK_C channels; weight [O, k * k * C]; residual
    and out [B, H, W, O], in boxes of as many pixels and SLICE channels. columns and rows are
    numbers of boxes. Residual and output of one dtype share a buffer.
    """
    half: gl.constexpr = x_desc.dtype
    SHARED: gl.constexpr = HAS_RESIDUAL and residual_desc.dtype == out_desc.dtype
    box: gl.constexpr = x_desc.block_shape
    shape: gl.constexpr = [BUFFERS, box[0], box[1], box[2], BLOCK_C]
    xs = gl.allocate_shared_memory(half, shape, x_desc.layout)
    weights = gl.allocate_shared_memory(half, [BUFFERS, BLOCK_O, BLOCK_C], weight_desc.layout)
    part: gl.constexpr = [OUTS, box[0], box[1], box[2], SLICE]
    outs = gl.allocate_shared_memory(out_desc.dtype, part, out_desc.layout)
    residuals = outs
    if HAS_RESIDUAL and not SHARED:
        residuals = gl.allocate_shared_memory(residual_desc.dtype, part, residual_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    residual_loaded = gl.allocate_shared_memory(gl.int64, [OUTS, 1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [OUTS, 1], mbarrier.MBarrierLayout())
    out_free = gl.allocate_shared_memory(gl.int64, [OUTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(OUTS):
        mbarrier.init(residual_loaded.index(i), count=1)
        mbarrier.init(out_full.index(i), count=1)
        mbarrier.init(out_free.index(i), count=1)

    blocks: gl.constexpr = (OUT + BLOCK_O - 1) // BLOCK_O
    grid = (blocks, columns, rows)
    buffers = (xs, weights, residuals, outs)
    barriers = (loaded, free, residual_loaded, out_full, out_free)
    gl.warp_specialize(
        [
            (multiply_tiles, (
                bias_ptr, num_tiles, grid, buffers, barriers,
                KERNEL, HAS_RESIDUAL, RELU, C, OUT, BLOCK_O, BUFFERS, OUTS, num_warps,
            )),
            (load_tiles, (
                x_desc, weight_desc, residual_desc, num_tiles, grid, buffers, barriers,
                KERNEL, DILATION, HAS_RESIDUAL, C, BLOCK_O, BUFFERS, OUTS,
            )),
            (store_tiles, (
                x_desc, out_desc, num_tiles, grid, buffers, barriers, BLOCK_O, OUTS,
            )),
        ],
        worker_num_warps=[1, 1],
        worker_num_regs=[40, 40],
    )  # fmt: skip


@taped
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
    """x [B, C, H, W] → [B, O, H, W], channels-last, of what ``tiles.why_not_boxes`` allows.

    So ``stride`` is 1. ``precision`` and ``arch`` are for the launcher in ``implicit_gemm``, in
    whose place this one runs.
    """
    x, weight = nhwc(x), nhwc(weight)
    residual = None if residual is None else nhwc(residual)
    batch, height, width, channels = x.shape
    outputs, kernel, _, _ = weight.shape
    out = x.new_empty(batch, height, width, outputs, dtype=out_dtype)
    tile = tiles.boxes_tile(
        DTYPE_NAMES[x.dtype], outputs, batch * height * width,
        None if residual is None else residual.dtype, out_dtype,
    )  # fmt: skip

    def pixels(images: Tensor) -> Tensor:
        """Images as the kernel sees them: all pixels in one row, if no pixel needs another."""
        return images if kernel == 3 else images.view(1, 1, -1, images.shape[3])

    sizes = pixels(x).shape[:3]
    box = tiles.box(*sizes)
    boxes, rows, columns = map(cdiv, sizes, box)
    block_o = tile.meta["BLOCK_O"]
    num_tiles = boxes * rows * columns * cdiv(outputs, block_o)
    launch(
        conv_boxes, tile, x.device, min(num_tiles, multiprocessors(x.device)),
        described(pixels(x), *box, tiles.BOX_CHANNELS),
        described(weight.view(outputs, -1), block_o, tiles.BOX_CHANNELS),
        bias.contiguous(),
        None if residual is None else described(pixels(residual), *box, tiles.SLICE),
        described(pixels(out), *box, tiles.SLICE),
        num_tiles, columns, rows,
        C=channels, OUT=outputs, KERNEL=kernel, DILATION=dilation,
        HAS_RESIDUAL=residual is not None, RELU=relu,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2)
