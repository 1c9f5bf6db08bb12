"""The EM attention block in Triton: EM iterations on folded bases, then one epilogue kernel.

The mid convolution's output X = W₁F + b₁ is never formed: a stage runs on F with the folded bases
ν = W₁ᵀμ and the logit bias b₁ᵀμ. Its sums S = Σ F·Z and their mass r = Σ Z, both divided by the L1
norm of Z plus the shift, give the next bases μ = W₁S + r·b₁, normalised. r keeps a dead base at
zero. With G = W₁ᵀW₁ and g = W₁ᵀb₁, computed once a call, the next folded bases are GS + r·g: one
product leads from the sums of a stage to the bases of the next. G loses nothing here, as folded
bases are W₁ᵀ times a product with W₁ anyway. The norms, which G would make less exact, are those of
μ itself; the E step divides by them.
The epilogue reconstructs, applies ReLU and the out convolution and adds F, tile by tile.

Index letters: b image, m base of an image, n position, c input channel, o output channel, k base.
"""

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.checks import fitted
from emanet_triton.kernels.device import multiprocessors
from emanet_triton.kernels.em.attention import Bases, Stages, reconstruct
from emanet_triton.kernels.em.folding import em_fold, em_normalise, em_project
from emanet_triton.kernels.em.steps import backwards, load_features
from emanet_triton.kernels.launch import cdiv, with_fitting_tiles
from emanet_triton.kernels.tape import taped


@triton.jit
def em_epilogue(
    x_ptr, z_ptr, bases_ptr, weight_ptr, bias_ptr, out_ptr,
    N, num_tiles,
    stride_x_b, stride_x_n, stride_x_c, stride_out_b, stride_out_n, stride_out_c,
    C: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, OUT_RELU: tl.constexpr,
    Z_SCALE: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ReLU(F + W₂·ReLU(Zμᵀ) + b₂) for one tile of positions and BLOCK_O channels.

    With OUT_RELU another ReLU precedes the addition of F. WIDE says that offsets of the output
    within a tile need 64 bits.
    bases [B, K, C]; weight W₂ [C, C] in the features' dtype; bias b₂ [C] of any dtype.
    """
    pid = backwards()
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
    # Rows are counted from the tile's first: that needs fewer registers.
    first = (pid // num_blocks % num_tiles).to(tl.int64) * BLOCK_N
    o_tile = tl.arange(0, BLOCK_N)
    x_ptr += i_b * stride_x_b
    if CHANNELS_LAST:
        x_ptr += first * stride_x_n
        o_n, N = o_tile, N - first.to(tl.int32)
    b_x = load_features(x_ptr, o_n, o_o, N, stride_x_n, stride_x_c, C, BLOCK_O, CHANNELS_LAST)
    b_out += b_x.to(tl.float32)
    b_out = tl.where(b_out < 0.0, 0.0, b_out)  # a NaN stays NaN, as in torch.relu
    p_out = out_ptr + i_b * stride_out_b + first * stride_out_n
    o_tile = o_tile.to(tl.int64) if WIDE else o_tile
    p_out += (o_tile * stride_out_n)[:, None] + (o_o.to(tl.int64) * stride_out_c)[None, :]
    tl.store(p_out, b_out.to(element), mask=m_n[:, None] & m_o[None, :])


INTERPRETED = not isinstance(em_epilogue, triton.JITFunction)


class BlockStages(Stages):
    """``Stages`` and the launches of the block's own kernels."""

    def fold(
        self, bases: Tensor, weight: Tensor, bias: Tensor, gram: Tensor, num_stages: int
    ) -> Bases:
        """bases, float32 [1 or B, K, C] → W₁ᵀμ and b₁ᵀμ; for several stages also write G and g."""
        folded = torch.empty_like(bases, dtype=self.feats.dtype)
        logit_bias = bases.new_empty(bases.shape[:2])
        rows = logit_bias.numel()
        folding = programs = self._row_programs("em_fold", rows)
        if num_stages > 1:
            programs += self._row_programs("em_fold", len(gram))
        self.launch(
            em_fold, programs,
            bases, weight, bias, folded, logit_bias, gram, rows, folding,
            C=self.shape["C"], **self.overlap,
        )  # fmt: skip
        return Bases(folded, logit_bias)

    def project(
        self, sums: Tensor, mass: Tensor, weight: Tensor, bias: Tensor, gram: Tensor
    ) -> Bases:
        """sums [B, K, C] and mass [B, K] → the folded bases of the next stage."""
        out = torch.empty_like(sums, dtype=self.feats.dtype)
        rows = mass.numel()
        size = sums.new_empty(rows)
        parts = cdiv(self.shape["C"], self.tile("em_project").meta["BLOCK_O"])
        along, square = sums.new_empty(2, parts, rows)
        self._project(sums, mass, weight, bias, gram, out, along, square, size, FOLD=True)
        return Bases(out, along, square, size)

    def last_bases(self, sums: Tensor, mass: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sums [B, K, C] and mass [B, K] → μ, in the features' dtype."""
        mu = torch.empty_like(sums)
        self._project(sums, mass, weight, bias, None, mu, None, None, None, FOLD=False)
        out = torch.empty_like(mu, dtype=self.feats.dtype)
        constants = {"C": self.shape["C"], **self.overlap}
        self.launch(em_normalise, mass.numel(), mu, out, self.norm_shift, **constants)
        return out

    def _project(self, sums: Tensor, mass: Tensor, *arguments: Tensor | None, FOLD: bool) -> None:
        rows = mass.numel()
        programs = self._row_programs("em_project", rows)
        constants = {"C": self.shape["C"], "FOLD": FOLD, **self.overlap}
        self.launch(em_project, programs, sums, mass, *arguments, rows, **constants)

    def epilogue(self, bases: Tensor, weight: Tensor, bias: Tensor, out_relu: bool) -> Tensor:
        """bases [B, K, C], W₂ and b₂ → the block's output, [B, N, C].

        With ranges, ``em_output`` computes it in place of ``em_epilogue``.
        """
        out = torch.empty_like(self.feats)
        if self._hopper:
            self._output(bases, weight, bias, out, out_relu)
            return out
        batch, positions, channels = self.feats.shape
        meta = self.tile("em_epilogue").meta
        num_tiles = cdiv(positions, meta["BLOCK_N"])
        num_blocks = cdiv(channels, meta["BLOCK_O"])
        self.launch(
            em_epilogue, batch * num_tiles * num_blocks,
            self.feats, self.z, bases, weight, bias, out,
            positions, num_tiles, *self.feats.stride(), *out.stride(),
            **self.shape, PADDED_K=self.z.shape[2], OUT_RELU=out_relu,
            **self.z_scale, **self.channels_last,
            WIDE=meta["BLOCK_N"] * out.stride(1) >= 2**31,
        )  # fmt: skip
        return out

    def _output(
        self, bases: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_relu: bool
    ) -> None:
        output = importlib.import_module("emanet_triton.kernels.em.output")
        batch, positions, channels = self.feats.shape
        meta = self.tile("em_output").meta
        tiles_of_image = cdiv(positions, meta["BLOCK_N"])
        num_tiles = batch * tiles_of_image
        *inputs, out_desc = output.descriptors(self.feats, self.z, bases, weight, out, meta)
        self.launch(
            output.em_output, min(num_tiles, multiprocessors(self.feats.device)),
            *inputs, bias, out_desc, num_tiles, tiles_of_image,
            C=channels, OUT_RELU=out_relu, **self.z_scale, waits=True,
        )  # fmt: skip

    def _row_programs(self, kernel: str, rows: int) -> int:
        meta = self.tile(kernel).meta
        num_blocks = cdiv(self.shape["C"], meta["BLOCK_O"])
        return cdiv(rows, meta["BLOCK_M"]) * num_blocks


@taped
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
    ranges: int | None = None,
) -> tuple[Tensor, Tensor]:
    """feats [B, N, C], bases [1 or B, C, K] → block output [B, N, C], new bases [B, C, K].

    ``ranges`` is that of ``Stages``.
    """
    stages = BlockStages(feats, bases.shape[2], precision, norm_shift, ranges)
    mid = mid_weight.contiguous(), mid_bias.contiguous()
    # Nothing may copy them between two kernels: em_output reads them without waiting for the copy.
    out_weight, out_bias = out_weight.to(feats.dtype).contiguous(), out_bias.contiguous()
    if ranges is not None:
        out_weight = fitted(out_weight)
    # One copy if the dtype changes; ``to`` alone returns float32 bases as they are.
    mu = bases.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    mu = mu.contiguous()
    sums = mu.new_empty(feats.shape[0], *mu.shape[1:])
    mass = mu.new_empty(sums.shape[:2])
    gram = mu.new_empty(mu.shape[2] + 1, mu.shape[2])
    bases_of_stage = stages.fold(mu, *mid, gram, num_stages)
    for left in reversed(range(1, num_stages)):
        stages.stage(bases_of_stage, sums, mass, left=left)
        bases_of_stage = stages.project(sums, mass, *mid, gram)
    stages.stage(bases_of_stage, sums, mass, left=0)
    mu = stages.last_bases(sums, mass, *mid)
    out = stages.epilogue(mu, out_weight, out_bias, out_relu)
    return out, mu.transpose(1, 2)
