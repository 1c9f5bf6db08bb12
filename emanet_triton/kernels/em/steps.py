"""Kernels of an EM stage in Triton: the E step, the M step, and the sum of its partial results.

An E step stores the responsibilities Z [B, N, BLOCK_K] in the features' dtype, multiplied by
``Z_SCALE``. The M step sums X·Z over fixed ranges of positions, and a reduction adds these sums in
a fixed order, without atomics. So an image's result has the same bits on every run and in every
batch. Logits, softmax, sums and norms are float32.

Index letters: b image, n position, c channel, k base, s range of positions (split).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def guarded(norm):
    """The norm, but at least 1e-12, as ``torch.nn.functional.normalize`` divides by."""
    return tl.where(norm < 1e-12, 1e-12, norm)  # a NaN stays NaN


@triton.jit
def backwards():
    """The number of this program, counted from the last one.

    A kernel that reads what its predecessor has just read, in the opposite order, begins with what
    is still in the L2 cache.
    """
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def after_predecessor(OVERLAP: tl.constexpr):
    """With OVERLAP wait until the kernel before this one has ended; then the next one may start.

    Every program calls this first. So when the next kernel starts, all kernels before this one have
    ended. Until the next kernel waits, it may read only what this kernel does not write, and store
    nothing.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def load_features(
    x_ptr, o_n, o_c, N, stride_n, stride_c, C: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """X at positions ``o_n`` and channels ``o_c`` of one image, [BLOCK_N, BLOCK_C]."""
    if CHANNELS_LAST:
        # A row past the end repeats the last one: cheaper than a mask, and its Z is zero.
        o_n = tl.minimum(o_n, N - 1)
    p_x = x_ptr + (o_n.to(tl.int64) * stride_n)[:, None] + (o_c.to(tl.int64) * stride_c)[None, :]
    if not CHANNELS_LAST:
        b_x = tl.load(p_x, mask=(o_n < N)[:, None] & (o_c < C)[None, :], other=0.0)
    elif C % BLOCK_C == 0:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_c < C)[None, :], other=0.0)
    return b_x


@triton.jit
def logit_scale_and_bias(
    bias_ptr, square_ptr, size_ptr, i_b, o_k, o_part, m_k, num_rows, norm_shift, stride_bias_b,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What a base's products with features are multiplied by, and what is added: two [BLOCK_K].

    With PARTS the bases are not normalised yet (see ``BlockStages.project``), and o_part counts at
    least so many.
    """
    b_scale, b_bias = o_k * 0.0 + 1.0, o_k * 0.0  # in the layout of o_k, since Gluon needs one
    if PARTS > 0:
        o_row = i_b * K + o_k
        m_part = (o_part < PARTS)[:, None] & m_k[None, :]
        o_part = o_part[:, None] * num_rows + o_row[None, :]
        b_square = tl.sum(tl.load(square_ptr + o_part, mask=m_part, other=0.0), axis=0)
        b_bias = tl.sum(tl.load(bias_ptr + o_part, mask=m_part, other=0.0), axis=0)
        b_norm = guarded(tl.sqrt(b_square) + norm_shift)
        b_scale = tl.load(size_ptr + o_row, mask=m_k, other=0.0) / b_norm
        b_bias = b_bias / b_norm
    elif HAS_BIAS:
        b_bias = tl.load(bias_ptr + i_b * stride_bias_b + o_k, mask=m_k, other=0.0)
    return b_scale, b_bias


@triton.jit
def responsibilities(b_products, b_scale, b_bias, m_n, m_k, Z_SCALE: tl.constexpr):
    """Z of a tile from its products with the bases, float32 [BLOCK_N, BLOCK_K], times Z_SCALE."""
    b_logits = b_products * b_scale[None, :] + b_bias[None, :]
    b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
    b_z = tl.exp(b_logits - tl.max(b_logits, axis=1)[:, None])
    b_z = b_z / tl.sum(b_z, axis=1)[:, None] * Z_SCALE
    return tl.where(m_n[:, None], b_z, 0.0)


@triton.jit
def em_e_step(
    x_ptr, bases_ptr, bias_ptr, square_ptr, size_ptr, z_ptr, colsum_ptr,
    N, num_tiles, num_rows, norm_shift, stride_x_b, stride_x_n, stride_x_c, stride_bases_b,
    stride_bias_b,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    Z_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = softmax(Xᵀμ + bias) of one tile of positions, and its sums over these positions.

    bases [1 or B, K, C]; bias float32 [1 or B, K]; z [B, N, BLOCK_K], zero from K on;
    colsum float32 [B, K, num_tiles], the sums of the stored Z. With PARTS the bases are not
    normalised yet: see ``BlockStages.project``.
    """
    pid = backwards()
    i_b = (pid // num_tiles).to(tl.int64)
    i_n = pid % num_tiles
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    x_ptr += i_b * stride_x_b
    bases_ptr += i_b * stride_bases_b

    b_products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_x = load_features(
            x_ptr, o_n, o_c, N, stride_x_n, stride_x_c, C, BLOCK_C, CHANNELS_LAST
        )  # [BLOCK_N, BLOCK_C]
        p_mu = bases_ptr + o_k[None, :] * C + o_c[:, None]
        b_mu = tl.load(p_mu, mask=m_k[None, :] & (o_c < C)[:, None], other=0.0)
        b_products = tl.dot(b_x, b_mu, b_products, input_precision=PRECISION)
    PADDED_PARTS: tl.constexpr = triton.next_power_of_2(PARTS) if PARTS > 0 else 1
    b_scale, b_bias = logit_scale_and_bias(
        bias_ptr, square_ptr, size_ptr, i_b, o_k, tl.arange(0, PADDED_PARTS), m_k, num_rows,
        norm_shift, stride_bias_b, K, HAS_BIAS, PARTS,
    )  # fmt: skip
    b_z = responsibilities(b_products, b_scale, b_bias, o_n < N, m_k, Z_SCALE)
    b_z = b_z.to(z_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_K]
    p_z = z_ptr + (i_b * N + o_n)[:, None] * BLOCK_K + o_k[None, :]
    tl.store(p_z, b_z, mask=(o_n < N)[:, None])
    b_colsum = tl.sum(b_z.to(tl.float32), axis=0) * (1.0 / Z_SCALE)
    tl.store(colsum_ptr + (i_b * K + o_k) * num_tiles + i_n, b_colsum, mask=m_k)


@triton.jit
def em_m_step(
    x_ptr, z_ptr, partial_ptr,
    N, num_splits, stride_x_b, stride_x_n, stride_x_c,
    C: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, Z_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X·Z summed over SPLIT positions, for BLOCK_C channels: float32 [B, num_splits, K, C]."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_c = pid % num_blocks
    i_s = pid // num_blocks % num_splits
    i_b = (pid // num_blocks // num_splits).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, BLOCK_K)
    x_ptr += i_b * stride_x_b
    z_ptr += i_b * N * BLOCK_K

    b_sum = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for n in range(0, SPLIT, BLOCK_N):
        o_n = i_s * SPLIT + n + tl.arange(0, BLOCK_N)
        b_x = load_features(
            x_ptr, o_n, o_c, N, stride_x_n, stride_x_c, C, BLOCK_C, CHANNELS_LAST
        )  # [BLOCK_N, BLOCK_C]
        p_z = z_ptr + o_n.to(tl.int64)[None, :] * BLOCK_K + o_k[:, None]
        b_zt = tl.load(p_z, mask=(o_n < N)[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum = tl.dot(b_zt, b_x, b_sum, input_precision=PRECISION)
    p_sum = partial_ptr + ((i_b * num_splits + i_s) * K + o_k)[:, None] * C + o_c[None, :]
    tl.store(p_sum, b_sum * (1.0 / Z_SCALE), mask=(o_k < K)[:, None] & (o_c < C)[None, :])


@triton.jit
def em_reduce(
    partial_ptr, colsum_ptr, bases_ptr, mass_ptr,
    num_splits, num_tiles, norm_shift,
    C: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C channels of a base from its partial sums: the L1 norm over positions.

    With NORMALISE the L2 norm over channels follows, and BLOCK_C holds all channels. ``norm_shift``
    is added to both norms. bases [B, K, C]. Without NORMALISE mass, float32 [B, K], receives the
    sum of the L1-normalised responsibilities: 1 without a shift, or less for a base that is nearly
    dead.
    """
    after_predecessor(OVERLAP)
    num_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    i_c = tl.program_id(0) % num_blocks
    i_row = (tl.program_id(0) // num_blocks).to(tl.int64)
    i_b, i_k = i_row // K, i_row % K
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C

    o_t = tl.arange(0, BLOCK_T)
    b_mass = tl.zeros([BLOCK_T], tl.float32)
    for t in range(0, num_tiles, BLOCK_T):
        m_t = t + o_t < num_tiles
        b_mass += tl.load(colsum_ptr + i_row * num_tiles + t + o_t, mask=m_t, other=0.0)
    mass = tl.sum(b_mass, axis=0)

    o_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(0, num_splits, BLOCK_S):
        p_sum = partial_ptr + ((i_b * num_splits + s + o_s) * K + i_k)[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_sum, mask=(s + o_s < num_splits)[:, None] & m_c[None, :], other=0.0)
    divisor = guarded(mass + norm_shift)
    b_mu = tl.sum(b_sum, axis=0) / divisor  # [BLOCK_C]
    if NORMALISE:
        tl.static_assert(C <= BLOCK_C)
        b_mu = b_mu / guarded(tl.sqrt(tl.sum(b_mu * b_mu, axis=0)) + norm_shift)
    elif i_c == 0:
        tl.store(mass_ptr + i_row, mass / divisor)
    tl.store(bases_ptr + i_row * C + o_c, b_mu.to(bases_ptr.dtype.element_ty), mask=m_c)
