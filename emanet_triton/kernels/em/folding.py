"""The small products of the EM attention block, which need no features.

They fold the mid convolution into the bases, as ``block`` explains, and make new bases of the sums
of an M step. They multiply float32 in few programs, each of which has a part of the output.

Index letters: m base of an image, c input channel, o output channel.
"""

import triton
import triton.language as tl

from emanet_triton.kernels.em.steps import after_predecessor, guarded


@triton.jit
def chains(CHAINS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets [CHAINS, BLOCK_C] of the channels in a step of a small product, a row for each chain.

    With tensor cores a warp computes one chain, and the sums of the chains are added at the end. A
    warp then has several independent sums, so an addition need not wait for the one before.
    """
    return tl.arange(0, CHAINS)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def added(b_chains, CHAINS: tl.constexpr):
    """The sum of [CHAINS, rows, columns] over the chains, of which there are 1, 2, 4 or 8.

    ``tl.sum`` would exchange few numbers at a time, with barriers; here a thread gets all at once.
    """
    b = tl.permute(b_chains, (1, 2, 0))
    if CHAINS >= 2:
        b = added_halves(b)
    if CHAINS >= 4:
        b = added_halves(b)
    if CHAINS >= 8:
        b = added_halves(b)
    return tl.reshape(b, (b.shape[0], b.shape[1]))


@triton.jit
def added_halves(b):
    """[rows, columns, 2 n] → [rows, columns, n]."""
    first, second = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], b.shape[2] // 2, 2)))
    return first + second


@triton.jit
def em_fold(
    bases_ptr, weight_ptr, bias_ptr, folded_ptr, logit_bias_ptr, gram_ptr,
    num_rows, num_folding,
    C: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, CHAINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W₁ᵀμ and b₁ᵀμ by the first num_folding programs; G = W₁ᵀW₁ and g = W₁ᵀb₁ by the others.

    bases float32 [rows, C]; weight [C, C] and bias [C] of any dtype; folded [rows, C] in the
    features' dtype; logit_bias float32 [rows]; gram float32 [C + 1, C], G and then g.
    """
    after_predecessor(OVERLAP)
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    i_o = pid % num_blocks
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < C
    o_row = tl.arange(0, BLOCK_M)
    o_step = chains(CHAINS, BLOCK_C)
    b_out = tl.zeros([CHAINS, BLOCK_M, BLOCK_O], tl.float32)
    if pid < num_folding:
        o_m = (pid // num_blocks).to(tl.int64) * BLOCK_M + o_row
        m_m = o_m < num_rows
        b_along = tl.zeros([CHAINS, BLOCK_M, BLOCK_C], tl.float32)
        for c in range(0, C, CHAINS * BLOCK_C):
            o_c = c + o_step
            m_c = o_c < C
            p_mu = bases_ptr + o_m[None, :, None] * C + o_c[:, None, :]
            b_mu = tl.load(p_mu, mask=m_m[None, :, None] & m_c[:, None, :], other=0.0)
            p_weight = weight_ptr + o_c[:, :, None] * C + o_o[None, None, :]
            b_weight = tl.load(p_weight, mask=m_c[:, :, None] & m_o[None, None, :], other=0.0)
            b_out = tl.dot(b_mu, b_weight.to(tl.float32), b_out, input_precision=PRECISION)
            b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_along += b_mu * b_bias[:, None, :]
        p_folded = folded_ptr + o_m[:, None] * C + o_o[None, :]
        b_folded = added(b_out, CHAINS).to(folded_ptr.dtype.element_ty)
        tl.store(p_folded, b_folded, mask=m_m[:, None] & m_o[None, :])
        if i_o == 0:
            tl.store(logit_bias_ptr + o_m, tl.sum(tl.sum(b_along, axis=2), axis=0), mask=m_m)
    else:
        o_m = ((pid - num_folding) // num_blocks).to(tl.int64) * BLOCK_M + o_row
        for c in range(0, C, CHAINS * BLOCK_C):
            o_c = c + o_step
            m_c = o_c < C
            p_row = weight_ptr + o_c[:, None, :] * C + o_m[None, :, None]
            b_row = tl.load(p_row, mask=(o_m < C)[None, :, None] & m_c[:, None, :], other=0.0)
            p_bias = bias_ptr + o_c[:, None, :] + 0 * o_m[None, :, None]
            m_last = (o_m == C)[None, :, None] & m_c[:, None, :]
            b_bias = tl.load(p_bias, mask=m_last, other=0.0)
            b_row = b_row.to(tl.float32) + b_bias.to(tl.float32)
            p_weight = weight_ptr + o_c[:, :, None] * C + o_o[None, None, :]
            b_weight = tl.load(p_weight, mask=m_c[:, :, None] & m_o[None, None, :], other=0.0)
            b_out = tl.dot(b_row, b_weight.to(tl.float32), b_out, input_precision=PRECISION)
        p_gram = gram_ptr + o_m[:, None] * C + o_o[None, :]
        tl.store(p_gram, added(b_out, CHAINS), mask=(o_m <= C)[:, None] & m_o[None, :])


@triton.jit
def em_project(
    sums_ptr, mass_ptr, weight_ptr, bias_ptr, gram_ptr, out_ptr, along_ptr, square_ptr, size_ptr,
    num_rows,
    C: tl.constexpr, FOLD: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, CHAINS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The new bases μ = W₁S + r·b₁, float32 [rows, C], or with FOLD the folded bases W₁ᵀμ.

    sums float32 [rows, C], mass float32 [rows]; weight [C, C] and bias [C] of any dtype; gram as
    ``em_fold`` writes it. The folded bases are GS + r·g, in the features' dtype. They are not
    divided by the norm of μ, because no program has all of μ. They are divided by the size that μ
    would have if W₁ stretched all vectors alike, so that float16 can hold them: size, float32
    [rows]. along and square, float32 [blocks of channels, rows], receive the sums of b₁·μ and of
    μ² over BLOCK_O channels.
    """
    after_predecessor(OVERLAP)
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    i_o = pid % num_blocks
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_m = (pid // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, m_o = o_m < num_rows, o_o < C

    o_step = chains(CHAINS, BLOCK_C)
    b_mu = tl.zeros([CHAINS, BLOCK_M, BLOCK_O], tl.float32)
    b_folded = tl.zeros([CHAINS, BLOCK_M, BLOCK_O], tl.float32)
    b_sums2 = tl.zeros([CHAINS, BLOCK_M, BLOCK_C], tl.float32)
    b_bias2 = tl.zeros([CHAINS, BLOCK_C], tl.float32)
    b_trace = tl.zeros([CHAINS, BLOCK_C], tl.float32)
    for c in range(0, C, CHAINS * BLOCK_C):
        o_c = c + o_step
        m_c = o_c < C
        m_weight = m_c[:, :, None] & m_o[None, None, :]
        p_sums = sums_ptr + o_m[None, :, None] * C + o_c[:, None, :]
        b_sums = tl.load(p_sums, mask=m_m[None, :, None] & m_c[:, None, :], other=0.0)
        p_weight = weight_ptr + o_o[None, None, :] * C + o_c[:, :, None]
        b_weight = tl.load(p_weight, mask=m_weight, other=0.0)
        b_mu = tl.dot(b_sums, b_weight.to(tl.float32), b_mu, input_precision=PRECISION)
        if FOLD:
            p_gram = gram_ptr + o_c[:, :, None] * C + o_o[None, None, :]
            b_gram = tl.load(p_gram, mask=m_weight, other=0.0)
            b_folded = tl.dot(b_sums, b_gram, b_folded, input_precision=PRECISION)
            b_sums2 += b_sums * b_sums
            b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
            b_bias2 += b_bias * b_bias
            b_trace += tl.load(gram_ptr + o_c * (C + 1), mask=m_c, other=0.0)
    b_mu = added(b_mu, CHAINS)
    b_mass = tl.load(mass_ptr + o_m, mask=m_m, other=0.0)
    b_bias_o = tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
    b_mu += b_mass[:, None] * b_bias_o[None, :]
    p_out = out_ptr + o_m[:, None] * C + o_o[None, :]
    if FOLD:
        b_sums2 = tl.sum(tl.sum(b_sums2, axis=2), axis=0)
        b_size = tl.sum(b_trace) / C * b_sums2 + b_mass * b_mass * tl.sum(b_bias2)
        b_size = tl.where(b_size == 0.0, 1.0, tl.sqrt(b_size))
        b_gram_o = tl.load(gram_ptr + C * C + o_o, mask=m_o, other=0.0)
        b_folded = added(b_folded, CHAINS) + b_mass[:, None] * b_gram_o[None, :]
        b_folded /= b_size[:, None]
        b_folded = b_folded.to(out_ptr.dtype.element_ty)
        tl.store(p_out, b_folded, mask=m_m[:, None] & m_o[None, :])
        p_part = i_o.to(tl.int64) * num_rows + o_m
        tl.store(along_ptr + p_part, tl.sum(b_mu * b_bias_o[None, :], axis=1), mask=m_m)
        tl.store(square_ptr + p_part, tl.sum(b_mu * b_mu, axis=1), mask=m_m)
        if i_o == 0:
            tl.store(size_ptr + o_m, b_size, mask=m_m)
    else:
        tl.store(p_out, b_mu, mask=m_m[:, None] & m_o[None, :])


@triton.jit
def em_normalise(
    bases_ptr, out_ptr, norm_shift, C: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Float32 bases [rows, C], divided by their L2 norms plus the shift, in the dtype of out."""
    after_predecessor(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    b_mu = tl.load(bases_ptr + i_m * C + o_c, mask=o_c < C, other=0.0)
    b_mu = b_mu / guarded(tl.sqrt(tl.sum(b_mu * b_mu, axis=0)) + norm_shift)
    tl.store(out_ptr + i_m * C + o_c, b_mu.to(out_ptr.dtype.element_ty), mask=o_c < C)
