"""The end of the EM attention block in Gluon for NVIDIA's Hopper GPUs.

A program of ``em_output`` finishes one tile of positions after the other; its warps have three
roles. Two warp groups multiply and add. BLOCK_C channels of the reconstruction become a factor of
the out convolution in registers, while the tensor cores still multiply the channels before them.
One warp loads responsibilities, bases and weights, several steps ahead. One warp stores, and loads
features into the memory from which it has stored. Triton's interpreter does not run Gluon;
``tests/gluon_simulator.py`` does.

Index letters as in ``block``; step: BLOCK_C channels of the reconstruction for BLOCK_O channels of
the output; n counts steps of a program, n_out its slices of BLOCK_C output channels.
"""

from collections.abc import Mapping

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from emanet_triton.kernels.hopper import (
    arrive_together,
    async_load,
    async_store,
    columns,
    described,
)


@gluon.jit
def position(i, num_tiles, tiles_of_image, desc):
    """The image and the first position of the i-th tile, counted from the last: ``backwards``."""
    tile = num_tiles - 1 - i
    return tile // tiles_of_image, tile % tiles_of_image * desc.block_shape[1]


@gluon.jit
def load_factors(
    z_desc, bases_desc, weight_desc, num_tiles, tiles_of_image, buffers, barriers,
    C: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    """The loading warp: weights of each step, responsibilities of a tile, bases of an image.

    Responsibilities and bases may be replaced once the tile before has used them in all its steps.
    The multiplying warps wait for that before they free the weights of its last step but one, and
    these were in the buffer that step BUFFERS - 2 of this tile takes.
    """
    z_buf, mus, weights, _ = buffers
    z_loaded, loaded, free, _, _ = barriers
    STEPS: gl.constexpr = C // BLOCK_C
    ALL_STEPS: gl.constexpr = C // BLOCK_O * STEPS
    gl.static_assert(ALL_STEPS >= BUFFERS)
    Z_BYTES: gl.constexpr = z_desc.block_type.nbytes
    MU_BYTES: gl.constexpr = STEPS * bases_desc.block_type.nbytes
    n = 0
    image = -1
    step_of_z = BUFFERS - 1  # the first weights need not wait for the kernel before
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_b, first = position(tile, num_tiles, tiles_of_image, z_desc)
        for step in range(ALL_STEPS):
            i = n % BUFFERS
            mbarrier.wait(free.index(i), (n // BUFFERS & 1) ^ 1)
            if step == step_of_z:
                gdc_wait()
                mbarrier.expect(z_loaded, Z_BYTES, pred=i_b == image)
                mbarrier.expect(z_loaded, Z_BYTES + MU_BYTES, pred=i_b != image)
                async_load(z_desc, [i_b, first, 0], z_loaded, z_buf)
                for j in range(STEPS):  # zeros from K on
                    at = [i_b, 0, j * BLOCK_C]
                    async_load(bases_desc, at, z_loaded, mus.index(j), pred=i_b != image)
            mbarrier.expect(loaded.index(i), weight_desc.block_type.nbytes)
            o_first, c = step // STEPS * BLOCK_O, step % STEPS * BLOCK_C
            async_load(weight_desc, [o_first, c], loaded.index(i), weights.index(i))
            n += 1
        image = i_b
        step_of_z = BUFFERS - 2


@gluon.jit
def load_features(
    x_desc, n_out, num_tiles, tiles_of_image, outs, x_loaded,
    C: gl.constexpr, BLOCK_C: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """Load the features of a slice, if there is one, into the buffer of its output."""
    i = n_out % OUTS
    tile = gl.program_id(0) + n_out // (C // BLOCK_C) * gl.num_programs(0)
    exists = tile < num_tiles
    i_b, first = position(tile, num_tiles, tiles_of_image, x_desc)
    mbarrier.expect(x_loaded.index(i), x_desc.block_type.nbytes, pred=exists)
    at = [i_b, first, n_out % (C // BLOCK_C) * BLOCK_C]
    async_load(x_desc, at, x_loaded.index(i), outs.index(i), pred=exists)


@gluon.jit
def store_outputs(
    x_desc, out_desc, num_tiles, tiles_of_image, buffers, barriers,
    C: gl.constexpr, BLOCK_C: gl.constexpr, OUTS: gl.constexpr,
):  # fmt: skip
    """The storing warp; it also loads the features of the slice that comes next in a buffer."""
    _, _, _, outs = buffers
    _, _, _, x_loaded, out_full = barriers
    for j in range(OUTS):
        load_features(x_desc, j, num_tiles, tiles_of_image, outs, x_loaded, C, BLOCK_C, OUTS)
    gdc_wait()  # until then the kernel before may use the memory of the output
    n_out = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        i_b, first = position(tile, num_tiles, tiles_of_image, out_desc)
        for j in range(C // BLOCK_C):
            i = n_out % OUTS
            mbarrier.wait(out_full.index(i), n_out // OUTS & 1)
            async_store(out_desc, [i_b, first, j * BLOCK_C], outs.index(i))
            tma.store_wait(0)
            load_features(
                x_desc, n_out + OUTS, num_tiles, tiles_of_image, outs, x_loaded, C, BLOCK_C, OUTS
            )
            n_out += 1


@gluon.jit
def factor_of(b_recon, z_buf, FACTOR: gl.constexpr, Z_SCALE: gl.constexpr):
    """ReLU of channels of the reconstruction, as the tensor cores take it from registers."""
    b_recon = b_recon * (1.0 / Z_SCALE)
    b_recon = gl.where(b_recon < 0.0, 0.0, b_recon)  # a NaN stays NaN, as in torch.relu
    return gl.convert_layout(b_recon.to(z_buf.dtype), FACTOR)


@gluon.jit
def multiply(
    bias_ptr, num_tiles, buffers, barriers,
    C: gl.constexpr, OUT_RELU: gl.constexpr, Z_SCALE: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr,
    BUFFERS: gl.constexpr, OUTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The warp groups that multiply: each has half of the positions of a tile.

    A step begins the next step's product Zμᵀ before its own product with the weights, so the
    tensor cores have the second one to compute while the first one becomes a factor. The last step
    of a block of output channels prepares the first step of the next block, and in the last block
    nothing that is used. These warps do not wait for the kernel before: they read the bias alone,
    which is older, and what the other warps have loaded.
    """
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_O, 16]
    )
    PART: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_C, 16]
    )
    FACTOR: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    z_buf, mus, weights, outs = buffers
    z_loaded, loaded, free, x_loaded, out_full = barriers
    STEPS: gl.constexpr = C // BLOCK_C
    BLOCKS: gl.constexpr = C // BLOCK_O
    gl.static_assert(C % BLOCK_O == 0 and STEPS % 2 == 0)
    o_slice = gl.arange(0, BLOCK_C, gl.SliceLayout(0, PART))
    z = z_buf.reshape([BLOCK_N, BLOCK_K])
    n = 0
    n_out = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        mbarrier.wait(z_loaded, tile // gl.num_programs(0) & 1)
        b_zero = gl.full([BLOCK_N, BLOCK_C], 0.0, gl.float32, PART)
        mu = mus.index(0).reshape([BLOCK_K, BLOCK_C])
        b_recon = warpgroup_mma(z, mu, b_zero, use_acc=False, is_async=True)
        b_recon = warpgroup_mma_wait(0, deps=[b_recon])
        b_factor = factor_of(b_recon, z_buf, FACTOR, Z_SCALE)
        for block in range(BLOCKS):
            b_sum = warpgroup_mma_init(gl.full([BLOCK_N, BLOCK_O], 0.0, gl.float32, SUMS))
            for pair in range(STEPS // 2):
                for j in gl.static_range(2):  # two factors, as one is still being multiplied
                    step = 2 * pair + j
                    i = n % BUFFERS
                    mu = mus.index((step + 1) % STEPS).reshape([BLOCK_K, BLOCK_C])
                    # Into registers that hold a product already. Zeros in others would be written
                    # between two products, and then the assembler makes each wait for the other.
                    b_next = warpgroup_mma(z, mu, b_recon, use_acc=False, is_async=True)
                    mbarrier.wait(loaded.index(i), n // BUFFERS & 1)
                    weight = weights.index(i).permute([1, 0])
                    b_sum = warpgroup_mma(b_factor, weight, b_sum, is_async=True)
                    b_recon = warpgroup_mma_wait(1, deps=[b_next])  # and for the sums before
                    arrive_together(free.index((n + BUFFERS - 1) % BUFFERS), pred=step > 0)
                    b_factor = factor_of(b_recon, z_buf, FACTOR, Z_SCALE)
                    n += 1
            b_sum = warpgroup_mma_wait(0, deps=[b_sum])
            arrive_together(free.index((n + BUFFERS - 1) % BUFFERS))
            for j in gl.static_range(BLOCK_O // BLOCK_C):
                i = n_out % OUTS
                o_o = block * BLOCK_O + j * BLOCK_C + o_slice
                b_bias = gl.load(bias_ptr + o_o, mask=o_o < C, other=0.0).to(gl.float32)
                b_out = gl.convert_layout(columns(b_sum, j, BLOCK_C), PART) + b_bias[None, :]
                if OUT_RELU:
                    b_out = gl.where(b_out < 0.0, 0.0, b_out)
                out = outs.index(i).reshape([BLOCK_N, BLOCK_C])
                mbarrier.wait(x_loaded.index(i), n_out // OUTS & 1)
                b_out += out.load(PART).to(gl.float32)
                b_out = gl.where(b_out < 0.0, 0.0, b_out)
                out.store(b_out.to(outs.dtype))
                fence_async_shared()
                arrive_together(out_full.index(i))
                n_out += 1


@gluon.jit(do_not_specialize=["num_tiles", "tiles_of_image"])
def em_output(
    x_desc, z_desc, bases_desc, weight_desc, bias_ptr, out_desc, num_tiles, tiles_of_image,
    C: gl.constexpr, OUT_RELU: gl.constexpr, Z_SCALE: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr,
    BUFFERS: gl.constexpr, OUTS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What ``block.em_epilogue`` computes, for tiles of BLOCK_N positions.

    x and out [B, N, C], in boxes of BLOCK_N positions and BLOCK_C channels; z [B, N, BLOCK_K], in
    boxes of BLOCK_N positions; bases [B, K, C], in boxes of BLOCK_K bases and BLOCK_C channels;
    weight W₂ [C, C], in boxes of BLOCK_O output channels and BLOCK_C channels; bias b₂ [C] of any
    dtype. An image has tiles_of_image tiles.
    """
    half: gl.constexpr = x_desc.dtype
    z_buf = gl.allocate_shared_memory(half, [1, BLOCK_N, BLOCK_K], z_desc.layout)
    mus = gl.allocate_shared_memory(half, [C // BLOCK_C, 1, BLOCK_K, BLOCK_C], bases_desc.layout)
    weights = gl.allocate_shared_memory(half, [BUFFERS, BLOCK_O, BLOCK_C], weight_desc.layout)
    outs = gl.allocate_shared_memory(half, [OUTS, 1, BLOCK_N, BLOCK_C], out_desc.layout)
    of_z = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    x_loaded = gl.allocate_shared_memory(gl.int64, [OUTS, 1], mbarrier.MBarrierLayout())
    out_full = gl.allocate_shared_memory(gl.int64, [OUTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(of_z.index(0), count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(OUTS):
        mbarrier.init(x_loaded.index(i), count=1)
        mbarrier.init(out_full.index(i), count=1)

    buffers = (z_buf, mus, weights, outs)
    barriers = (of_z.index(0), loaded, free, x_loaded, out_full)
    gl.warp_specialize(
        [
            (multiply, (
                bias_ptr, num_tiles, buffers, barriers,
                C, OUT_RELU, Z_SCALE, BLOCK_N, BLOCK_O, BLOCK_C, BLOCK_K, BUFFERS, OUTS, num_warps,
            )),
            (load_factors, (
                z_desc, bases_desc, weight_desc, num_tiles, tiles_of_image, buffers, barriers,
                C, BLOCK_O, BLOCK_C, BUFFERS,
            )),
            (store_outputs, (
                x_desc, out_desc, num_tiles, tiles_of_image, buffers, barriers, C, BLOCK_C, OUTS,
            )),
        ],
        worker_num_warps=[1, 1],
        worker_num_regs=[40, 40],
    )  # fmt: skip


def descriptors(
    feats: Tensor, z: Tensor, bases: Tensor, weight: Tensor, out: Tensor, meta: Mapping[str, int]
) -> tuple[TensorDescriptor, ...]:
    """What a kernel with the block sizes ``meta`` loads and stores the tensors by.

    A descriptor takes ``feats``, and so ``out``, which is like them.
    """
    block_n, block_c, block_k = meta["BLOCK_N"], meta["BLOCK_C"], meta["BLOCK_K"]
    return (
        described(feats, 1, block_n, block_c),
        described(z, 1, block_n, block_k),
        described(bases, 1, block_k, block_c),
        described(weight, meta["BLOCK_O"], block_c),
        described(out, 1, block_n, block_c),
    )
