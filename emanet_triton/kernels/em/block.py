"""The EM attention block in Triton: EM iterations on folded bases, then one epilogue kernel.

The mid convolution's output X = W₁F + b₁ is never formed: a stage runs on F with the folded bases
ν = W₁ᵀμ and the logit bias b₁ᵀμ. Its sums S = Σ F·Z and their mass r = Σ Z, both divided by the L1
norm of Z plus the shift, give the next bases μ = W₁S + r·b₁, normalised. r keeps a dead base at
zero. The epilogue reconstructs, applies ReLU and the out convolution and adds F, tile by tile.

Index letters: b image, m base of an image, n position, c input channel, o output channel, k base.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.em.attention import EPS, Stages, load_features, reconstruct
from emanet_triton.kernels.launch import cdiv, with_fitting_tiles


@triton.jit
def em_project(
    sums_ptr, mass_ptr, weight_ptr, bias_ptr, out_ptr,
    num_rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """W₁S + r·b₁, float32: sums [rows, C], mass [rows]; of any dtype: weight [C, C], bias [C]."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    o_o = pid % num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_m = (pid // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, m_o = o_m < num_rows, o_o < C

    b_out = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        p_sums = sums_ptr + o_m[:, None] * C + o_c[None, :]
        b_sums = tl.load(p_sums, mask=m_m[:, None] & m_c[None, :], other=0.0)
        p_weight = weight_ptr + o_o[None, :] * C + o_c[:, None]
        b_weight = tl.load(p_weight, mask=m_c[:, None] & m_o[None, :], other=0.0)
        b_out = tl.dot(b_sums, b_weight.to(tl.float32), b_out, input_precision=PRECISION)
    b_mass = tl.load(mass_ptr + o_m, mask=m_m, other=0.0)
    b_bias = tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
    p_out = out_ptr + o_m[:, None] * C + o_o[None, :]
    b_out += b_mass[:, None] * b_bias[None, :]
    tl.store(p_out, b_out, mask=m_m[:, None] & m_o[None, :])


@triton.jit
def em_fold(
    bases_ptr, weight_ptr, bias_ptr, folded_ptr, logit_bias_ptr,
    num_rows, norm_shift,
    C: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W₁ᵀμ and b₁ᵀμ; with NORMALISE the bases are first divided by their L2 norms plus the shift.

    bases float32 [rows, C]; weight [C, C] and bias [C] of any dtype; folded [rows, C] in the
    features' dtype; logit_bias float32 [rows].
    """
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    i_o = pid % num_blocks
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_m = (pid // num_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m, m_o = o_m < num_rows, o_o < C

    b_folded = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    b_along = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        p_mu = bases_ptr + o_m[:, None] * C + o_c[None, :]
        b_mu = tl.load(p_mu, mask=m_m[:, None] & m_c[None, :], other=0.0)  # [BLOCK_M, BLOCK_C]
        p_weight = weight_ptr + o_c[:, None] * C + o_o[None, :]
        b_weight = tl.load(p_weight, mask=m_c[:, None] & m_o[None, :], other=0.0)
        b_folded = tl.dot(b_mu, b_weight.to(tl.float32), b_folded, input_precision=PRECISION)
        b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_along += b_mu * b_bias[None, :]
        b_square += b_mu * b_mu
    b_logit = tl.sum(b_along, axis=1)
    if NORMALISE:
        norm = tl.sqrt(tl.sum(b_square, axis=1)) + norm_shift
        norm = tl.where(norm < EPS, EPS, norm)  # a NaN stays NaN
        b_folded = b_folded / norm[:, None]
        b_logit = b_logit / norm
    p_folded = folded_ptr + o_m[:, None] * C + o_o[None, :]
    b_folded = b_folded.to(folded_ptr.dtype.element_ty)
    tl.store(p_folded, b_folded, mask=m_m[:, None] & m_o[None, :])
    if i_o == 0:
        tl.store(logit_bias_ptr + o_m, b_logit, mask=m_m)


@triton.jit
def em_normalise(bases_ptr, out_ptr, norm_shift, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Float32 bases [rows, C], divided by their L2 norms plus the shift, in the dtype of out."""
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    b_mu = tl.load(bases_ptr + i_m * C + o_c, mask=o_c < C, other=0.0)
    norm = tl.sqrt(tl.sum(b_mu * b_mu, axis=0)) + norm_shift
    b_mu = b_mu / tl.where(norm < EPS, EPS, norm)
    tl.store(out_ptr + i_m * C + o_c, b_mu.to(out_ptr.dtype.element_ty), mask=o_c < C)


@triton.jit
def em_epilogue(
    x_ptr, z_ptr, bases_ptr, weight_ptr, bias_ptr, out_ptr,
    N, num_tiles,
    stride_x_b, stride_x_n, stride_x_c, stride_out_b, stride_out_n, stride_out_c,
    C: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, OUT_RELU: tl.constexpr,
    Z_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ReLU(F + W₂·ReLU(Zμᵀ) + b₂) for one tile of positions and BLOCK_O channels.

    With OUT_RELU another ReLU precedes the addition of F.
    bases [B, K, C]; weight W₂ [C, C] in the features' dtype; bias b₂ [C] of any dtype.
    """
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_O - 1) // BLOCK_O
    o_o = pid % num_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    o_n = pid // num_blocks % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    i_b = (pid // num_blocks // num_tiles).to(tl.int64)
    m_n, m_o = o_n < N, o_o < C
    element = z_ptr.dtype.element_ty
    z_ptr += i_b * N * PADDED_K
    bases_ptr += i_b * K * C

    o_k = tl.arange(0, BLOCK_K)
    if PADDED_K == BLOCK_K:  # all of Z stays in registers
        p_z = z_ptr + o_n.to(tl.int64)[:, None] * PADDED_K + o_k[None, :]
        b_z = tl.load(p_z, mask=m_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
    b_out = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        if PADDED_K == BLOCK_K:
            m_mu = (o_k < K)[:, None] & m_c[None, :]
            b_mu = tl.load(bases_ptr + o_k[:, None] * C + o_c[None, :], mask=m_mu, other=0.0)
            b_recon = tl.dot(b_z, b_mu, input_precision=PRECISION)  # [BLOCK_N, BLOCK_C]
        else:
            b_recon = reconstruct(
                z_ptr, bases_ptr, o_n, o_c, N, C, K, PADDED_K, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION
            )
        b_recon = b_recon * (1.0 / Z_SCALE)
        b_recon = tl.where(b_recon < 0.0, 0.0, b_recon).to(element)
        p_weight = weight_ptr + o_o[None, :] * C + o_c[:, None]
        b_weight = tl.load(p_weight, mask=m_c[:, None] & m_o[None, :], other=0.0)
        b_out = tl.dot(b_recon, b_weight, b_out, input_precision=PRECISION)
    b_out += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    if OUT_RELU:
        b_out = tl.where(b_out < 0.0, 0.0, b_out)
    x_ptr += i_b * stride_x_b
    b_x = load_features(x_ptr, o_n, o_o, N, stride_x_n, stride_x_c, C, BLOCK_O, CHANNELS_LAST)
    b_out += b_x.to(tl.float32)
    b_out = tl.where(b_out < 0.0, 0.0, b_out)  # a NaN stays NaN, as in torch.relu
    o_n, o_o = o_n.to(tl.int64), o_o.to(tl.int64)
    p_out = out_ptr + i_b * stride_out_b + (o_n * stride_out_n)[:, None]
    p_out += (o_o * stride_out_c)[None, :]
    tl.store(p_out, b_out.to(element), mask=m_n[:, None] & m_o[None, :])


INTERPRETED = not isinstance(em_epilogue, triton.JITFunction)


class BlockStages(Stages):
    """``Stages`` and the launches of the block's own kernels."""

    def project(self, sums: Tensor, mass: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sums [B, K, C] and mass [B, K] → W₁S + r·b₁, float32 [B, K, C]."""
        out = torch.empty_like(sums)
        rows = mass.numel()
        programs = self._row_programs("em_project", rows)
        self.launch(em_project, programs, sums, mass, weight, bias, out, rows, C=self.shape["C"])
        return out

    def fold(
        self, bases: Tensor, weight: Tensor, bias: Tensor, normalise: bool
    ) -> tuple[Tensor, Tensor]:
        """bases, float32 [B, K, C] → W₁ᵀμ in the features' dtype and b₁ᵀμ, float32 [B, K]."""
        folded = torch.empty_like(bases, dtype=self.feats.dtype)
        logit_bias = bases.new_empty(bases.shape[:2])
        rows = logit_bias.numel()
        self.launch(
            em_fold, self._row_programs("em_fold", rows),
            bases, weight, bias, folded, logit_bias, rows, self.norm_shift,
            C=self.shape["C"], NORMALISE=normalise,
        )  # fmt: skip
        return folded, logit_bias

    def normalise(self, bases: Tensor) -> Tensor:
        """bases, float32 [B, K, C] → divided by their shifted norms, in the features' dtype."""
        out = torch.empty_like(bases, dtype=self.feats.dtype)
        rows = bases[..., 0].numel()
        self.launch(em_normalise, rows, bases, out, self.norm_shift, C=self.shape["C"])
        return out

    def epilogue(self, bases: Tensor, weight: Tensor, bias: Tensor, out_relu: bool) -> Tensor:
        batch, positions, channels = self.feats.shape
        meta = self.tile("em_epilogue").meta
        num_tiles = cdiv(positions, meta["BLOCK_N"])
        num_blocks = cdiv(channels, meta["BLOCK_O"])
        out = torch.empty_like(self.feats)
        self.launch(
            em_epilogue, batch * num_tiles * num_blocks,
            self.feats, self.z, bases, weight, bias, out,
            positions, num_tiles, *self.feats.stride(), *out.stride(),
            **self.shape, PADDED_K=self.z.shape[2], OUT_RELU=out_relu,
            **self.z_scale, **self.channels_last,
        )  # fmt: skip
        return out

    def _row_programs(self, kernel: str, rows: int) -> int:
        meta = self.tile(kernel).meta
        num_blocks = cdiv(self.shape["C"], meta["BLOCK_O"])
        return cdiv(rows, meta["BLOCK_M"]) * num_blocks


@with_fitting_tiles
def run_block(
    feats: Tensor,
    bases: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_stages: int,
    norm_shift: float,
    out_relu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """feats [B, N, C], bases [1 or B, C, K] → block output [B, N, C], new bases [B, C, K]."""
    stages = BlockStages(feats, bases.shape[2], precision, norm_shift)
    mid = mid_weight.contiguous(), mid_bias.contiguous()
    # One copy if the dtype changes; ``to`` alone returns float32 bases as they are.
    mu = bases.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    mu = mu.contiguous()
    sums = mu.new_empty(feats.shape[0], *mu.shape[1:])
    mass = mu.new_empty(sums.shape[:2])
    for stage in range(num_stages):
        stages.e_step(*stages.fold(mu, *mid, normalise=stage > 0))
        stages.m_step(sums, mass)
        mu = stages.project(sums, mass, *mid)
    mu = stages.normalise(mu)
    weight = out_weight.to(feats.dtype).contiguous()
    out = stages.epilogue(mu, weight, out_bias.contiguous(), out_relu)
    return out, mu.transpose(1, 2)
