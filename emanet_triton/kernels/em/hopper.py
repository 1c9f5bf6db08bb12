"""E and M step in one pass over the features, in Gluon for NVIDIA's Hopper GPUs.

Triton itself keeps no tile of all channels in shared memory while it loads the next one. Gluon, the
language below Triton's, lets a kernel place its loads: the tile after the next is loaded as soon as
the M step has read the one before. Triton's interpreter does not run Gluon;
``tests/gluon_simulator.py`` does.

Index letters as in ``steps``.
"""

import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from emanet_triton.kernels.em.steps import logit_scale_and_bias, responsibilities
from emanet_triton.kernels.hopper import async_load, async_store, described

# Triton would compile another kernel where one of these is 1 or a multiple of 16. It would not be
# faster, since descriptors address X and Z.
UNSPECIALISED = "N", "split", "num_splits", "first_program", "step_bases_b"


@gluon.jit(do_not_specialize=UNSPECIALISED)
def em_stage(
    x_desc, bases_desc, bias_ptr, square_ptr, size_ptr, z_desc, partial_ptr, colsum_ptr,
    N, split, num_splits, first_program, num_rows, norm_shift, step_bases_b, stride_bias_b,
    C: gl.constexpr, K: gl.constexpr, HAS_BIAS: gl.constexpr, PARTS: gl.constexpr,
    STORE_Z: gl.constexpr, Z_SCALE: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """E and M step of ``split`` positions, a multiple of BLOCK_N, in one pass over X.

    x [B, N, C]; bases [1 or B, K, C]; z [B, N, BLOCK_K], written with STORE_Z only, zero from K on;
    partial float32 [B, num_splits, K, C]; colsum float32 [B, K, num_splits]; bias, square and size
    as for ``em_e_step``. C is a power of two. first_program is 0, or the number of the last
    program: then the programs go through X backwards (see ``steps.backwards``).
    """
    GROUPS: gl.constexpr = num_warps // 4  # warp groups: in the E step they share the bases,
    BY_BASES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, GROUPS], instr_shape=[16, BLOCK_K // GROUPS, 16]
    )
    BY_CHANNELS: gl.constexpr = gl.NVMMADistributedLayout(  # in the M step the channels
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, BLOCK_K, 16]
    )
    OUTPUT: gl.constexpr = gl.BlockedLayout([4, 1], [32, 1], [4, GROUPS], [0, 1])
    element: gl.constexpr = x_desc.dtype
    TILE_BYTES: gl.constexpr = x_desc.block_type.nbytes
    MU: gl.constexpr = 2  # the barrier of the bases follows those of two tiles of X

    pid = first_program - gl.program_id(0)
    pid = gl.where(pid < 0, -pid, pid)
    i_s = pid % num_splits
    i_b = pid // num_splits
    begin = i_s * split
    num_tiles = (gl.minimum(split, N - begin) + BLOCK_N - 1) // BLOCK_N

    x_bufs = gl.allocate_shared_memory(element, [2, 1, BLOCK_N, C], x_desc.layout)
    mu_buf = gl.allocate_shared_memory(element, [1, BLOCK_K, C], bases_desc.layout)
    z_buf = gl.allocate_shared_memory(element, [1, BLOCK_N, BLOCK_K], z_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(3):
        mbarrier.init(loaded.index(j), count=1)
    for j in gl.static_range(2):
        has_tile = j < num_tiles
        mbarrier.expect(loaded.index(j), TILE_BYTES, pred=has_tile)
        start = begin + j * BLOCK_N
        async_load(x_desc, [i_b, start, 0], loaded.index(j), x_bufs.index(j), pred=has_tile)
    gdc_wait()  # X is older than the kernel before this one, all other inputs may be its own
    mbarrier.expect(loaded.index(MU), bases_desc.block_type.nbytes)
    async_load(bases_desc, [i_b * step_bases_b, 0, 0], loaded.index(MU), mu_buf)  # zeros from K on

    o_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_BASES))
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, BY_BASES))
    PADDED_PARTS: gl.constexpr = triton.next_power_of_2(PARTS) if PARTS > 0 else 1
    o_part = gl.arange(0, PADDED_PARTS, gl.SliceLayout(1, BY_BASES))
    m_k = o_k < K
    b_scale, b_bias = logit_scale_and_bias(
        bias_ptr, square_ptr, size_ptr, i_b.to(gl.int64), o_k, o_part, m_k, num_rows, norm_shift,
        stride_bias_b, K, HAS_BIAS, PARTS,
    )  # fmt: skip
    b_sum = gl.full([C, BLOCK_K], 0.0, gl.float32, BY_CHANNELS)
    b_mass = gl.full([BLOCK_N, BLOCK_K], 0.0, gl.float32, BY_BASES)
    mu_t = mu_buf.reshape([BLOCK_K, C]).permute([1, 0])
    z = z_buf.reshape([BLOCK_N, BLOCK_K])
    mbarrier.wait(loaded.index(MU), 0)
    for t in range(num_tiles):
        i = t % 2
        first = begin + t * BLOCK_N
        x = x_bufs.index(i).reshape([BLOCK_N, C])  # zeros from N on
        mbarrier.wait(loaded.index(i), t // 2 % 2)
        b_zero = gl.full([BLOCK_N, BLOCK_K], 0.0, gl.float32, BY_BASES)
        b_products = warpgroup_mma(x, mu_t, b_zero, use_acc=False, is_async=True)
        b_products = warpgroup_mma_wait(0, deps=[b_products])
        b_z = responsibilities(b_products, b_scale, b_bias, o_n < N - first, m_k, Z_SCALE)
        b_z = b_z.to(element)  # [BLOCK_N, BLOCK_K]
        b_mass += b_z.to(gl.float32)
        if STORE_Z:
            tma.store_wait(0)  # the tile before has left z
        z.store(b_z)
        fence_async_shared()
        if STORE_Z:
            async_store(z_desc, [i_b, first, 0], z_buf)
        b_sum = warpgroup_mma(x.permute([1, 0]), z, b_sum, is_async=True)
        b_sum = warpgroup_mma_wait(0, deps=[b_sum])
        has_tile = t + 2 < num_tiles
        mbarrier.expect(loaded.index(i), TILE_BYTES, pred=has_tile)
        start = first + 2 * BLOCK_N
        async_load(x_desc, [i_b, start, 0], loaded.index(i), x_bufs.index(i), pred=has_tile)
    if STORE_Z:
        tma.store_wait(0)
    for j in gl.static_range(3):
        mbarrier.invalidate(loaded.index(j))

    # The sums of Z first: that frees registers for the other sums.
    p_colsum = colsum_ptr + i_b.to(gl.int64) * K * num_splits + i_s + o_k * num_splits
    gl.store(p_colsum, gl.sum(b_mass, axis=0) * (1.0 / Z_SCALE), mask=m_k)
    b_out = gl.convert_layout(b_sum * (1.0 / Z_SCALE), OUTPUT)
    o_c = gl.arange(0, C, gl.SliceLayout(1, OUTPUT))
    o_k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, OUTPUT))
    p_sum = partial_ptr + pid.to(gl.int64) * (K * C) + (o_k * C)[None, :] + o_c[:, None]
    gl.store(p_sum, b_out, mask=(o_k < K)[None, :])


def rows_of(tensor: Tensor, count: int) -> TensorDescriptor:
    """What ``em_stage`` loads and stores ``count`` rows of an image by; tensor [B, rows, width]."""
    return described(tensor, 1, count, tensor.shape[2])
