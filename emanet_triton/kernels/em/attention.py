"""EM attention in Triton: kernels for the E step, the M step and the sum of its partial results.

The responsibilities Z [B, N, BLOCK_K] are stored between the E and the M step, in the features'
dtype and multiplied by ``Z_SCALE``. The M step sums X·Z over fixed ranges of positions, and a
reduction adds these sums in a fixed order, without atomics. So an image's result has the same bits
on every run and in every batch. Logits, softmax, sums and norms are float32.

Index letters: b image, n position, c channel, k base, s range of positions (split).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.launch import cdiv, fitting, launch, with_fitting_tiles
from emanet_triton.kernels.tile import Tile

EPS = tl.constexpr(1e-12)  # the guard of torch.nn.functional.normalize
# float16 holds numbers down to 2^-24 only. Scaled by 2^15, responsibilities reach down to 2^-39.
Z_SCALES = {torch.bfloat16: 1.0, torch.float16: 2.0**15, torch.float32: 1.0}


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
def em_e_step(
    x_ptr, bases_ptr, bias_ptr, z_ptr, colsum_ptr,
    N, num_tiles, stride_x_b, stride_x_n, stride_x_c, stride_bases_b, stride_bias_b,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, Z_SCALE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Z = softmax(Xᵀμ + bias) of one tile of positions, and its sums over these positions.

    bases [1 or B, K, C]; bias float32 [1 or B, K]; z [B, N, BLOCK_K], zero from K on;
    colsum float32 [B, K, num_tiles], the sums of the stored Z.
    """
    pid = tl.program_id(0)
    i_b = (pid // num_tiles).to(tl.int64)
    i_n = pid % num_tiles
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    x_ptr += i_b * stride_x_b
    bases_ptr += i_b * stride_bases_b

    b_logits = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        b_x = load_features(
            x_ptr, o_n, o_c, N, stride_x_n, stride_x_c, C, BLOCK_C, CHANNELS_LAST
        )  # [BLOCK_N, BLOCK_C]
        p_mu = bases_ptr + o_k[None, :] * C + o_c[:, None]
        b_mu = tl.load(p_mu, mask=m_k[None, :] & (o_c < C)[:, None], other=0.0)
        b_logits = tl.dot(b_x, b_mu, b_logits, input_precision=PRECISION)
    if HAS_BIAS:
        b_logits += tl.load(bias_ptr + i_b * stride_bias_b + o_k, mask=m_k, other=0.0)[None, :]
    b_logits = tl.where(m_k[None, :], b_logits, float("-inf"))
    b_z = tl.exp(b_logits - tl.max(b_logits, axis=1)[:, None])
    b_z = b_z / tl.sum(b_z, axis=1)[:, None] * Z_SCALE
    b_z = tl.where((o_n < N)[:, None], b_z, 0.0).to(z_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_K]
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
    C: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One base from its partial sums: the L1 norm over positions, then the L2 norm over channels.

    ``norm_shift`` is added to both norms. bases [B, K, C]. Without NORMALISE the L2 norm is left
    out, and mass, float32 [B, K], receives the sum of the L1-normalised responsibilities: 1 without
    a shift, or less for a base that is nearly dead.
    """
    pid = tl.program_id(0).to(tl.int64)
    i_b, i_k = pid // K, pid % K
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C

    o_t = tl.arange(0, BLOCK_T)
    b_mass = tl.zeros([BLOCK_T], tl.float32)
    for t in range(0, num_tiles, BLOCK_T):
        m_t = t + o_t < num_tiles
        b_mass += tl.load(colsum_ptr + pid * num_tiles + t + o_t, mask=m_t, other=0.0)
    mass = tl.sum(b_mass, axis=0)

    o_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for s in range(0, num_splits, BLOCK_S):
        p_sum = partial_ptr + ((i_b * num_splits + s + o_s) * K + i_k)[:, None] * C + o_c[None, :]
        b_sum += tl.load(p_sum, mask=(s + o_s < num_splits)[:, None] & m_c[None, :], other=0.0)
    # A NaN must stay NaN, so the guards are comparisons and not tl.maximum.
    shifted = mass + norm_shift
    guarded = tl.where(shifted < EPS, EPS, shifted)
    b_mu = tl.sum(b_sum, axis=0) / guarded  # [BLOCK_C]
    if NORMALISE:
        norm = tl.sqrt(tl.sum(b_mu * b_mu, axis=0)) + norm_shift
        b_mu = b_mu / tl.where(norm < EPS, EPS, norm)
    else:
        tl.store(mass_ptr + pid, mass / guarded)
    tl.store(bases_ptr + pid * C + o_c, b_mu.to(bases_ptr.dtype.element_ty), mask=m_c)


@triton.jit
def reconstruct(
    z_ptr, bases_ptr, o_n, o_c, N,
    C: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Zμᵀ at positions ``o_n`` and channels ``o_c`` of one image, [BLOCK_N, BLOCK_C]."""
    b_recon = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for k in range(0, PADDED_K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        p_z = z_ptr + o_n.to(tl.int64)[:, None] * PADDED_K + o_k[None, :]
        b_z = tl.load(p_z, mask=(o_n < N)[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
        p_mu = bases_ptr + o_k[:, None] * C + o_c[None, :]
        m_mu = (o_k < K)[:, None] & (o_c < C)[None, :]
        b_mu = tl.load(p_mu, mask=m_mu, other=0.0)  # [BLOCK_K, BLOCK_C]
        b_recon = tl.dot(b_z, b_mu, b_recon, input_precision=PRECISION)
    return b_recon


@triton.jit
def em_reconstruct(
    z_ptr, bases_ptr, out_ptr,
    N, num_tiles, stride_out_b, stride_out_n, stride_out_c,
    C: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, Z_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Zμᵀ for one tile of positions and BLOCK_C channels: z [B, N, PADDED_K], bases [B, K, C]."""
    pid = tl.program_id(0)
    num_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    o_c = pid % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = pid // num_blocks % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    i_b = (pid // num_blocks // num_tiles).to(tl.int64)
    z_ptr += i_b * N * PADDED_K
    bases_ptr += i_b * K * C
    b_recon = reconstruct(
        z_ptr, bases_ptr, o_n, o_c, N, C, K, PADDED_K, BLOCK_N, BLOCK_C, BLOCK_K, PRECISION
    ) * (1.0 / Z_SCALE)
    m_out = (o_n < N)[:, None] & (o_c < C)[None, :]
    o_n, o_c = o_n.to(tl.int64), o_c.to(tl.int64)
    p_out = out_ptr + i_b * stride_out_b + (o_n * stride_out_n)[:, None]
    p_out += (o_c * stride_out_c)[None, :]
    tl.store(p_out, b_recon.to(out_ptr.dtype.element_ty), mask=m_out)


INTERPRETED = not isinstance(em_e_step, triton.JITFunction)


class Stages:
    """The launches of one EM run on features of one shape, and their workspace.

    Args:
        feats: [B, N, C], any strides.
        num_bases: K.
        precision: how float32 features are multiplied.
        norm_shift: added to both norms of an M step.
    """

    def __init__(self, feats: Tensor, num_bases: int, precision: str, norm_shift: float) -> None:
        self.feats = feats
        self.norm_shift = float(norm_shift)  # an integer would make another kernel
        self.shape = {"C": feats.shape[2], "K": num_bases}
        self.z_scale = {"Z_SCALE": Z_SCALES[feats.dtype]}
        self.channels_last = {"CHANNELS_LAST": feats.stride(2) == 1}
        self._arch = gpu_arch(feats.device)
        self._precision = precision
        batch, positions, channels = feats.shape
        self.split = tiles.split_length(positions)
        self.z = feats.new_empty(batch, positions, tiles.pad_bases(num_bases))
        num_tiles = cdiv(positions, self.tile("em_e_step").meta["BLOCK_N"])
        num_splits = cdiv(positions, self.split)
        self.colsum = feats.new_empty(batch, num_bases, num_tiles, dtype=torch.float32)
        partial = batch, num_splits, num_bases, channels
        self.partial = feats.new_empty(partial, dtype=torch.float32)

    def tile(self, kernel: str) -> Tile:
        channels, num_bases = self.shape.values()
        channels_last = self.channels_last["CHANNELS_LAST"]
        dtype = DTYPE_NAMES[self.feats.dtype]
        tile = tiles.tile(
            kernel, self._arch, dtype, channels, num_bases, channels_last, self._precision
        )
        return fitting(tile, self.feats.device)

    def launch(self, kernel, programs: int, *arguments, **constants) -> None:
        tile = self.tile(kernel.__name__)
        launch(kernel, tile, self.feats.device, programs, *arguments, **constants)

    def e_step(self, bases: Tensor, bias: Tensor | None = None) -> None:
        """Write Z from contiguous bases [1 or B, K, C] and logit biases, float32 [1 or B, K]."""
        batch, positions, _ = self.feats.shape
        num_tiles = self.colsum.shape[2]
        stride_bases_b, stride_bias_b = (
            0 if t is None or t.shape[0] == 1 else t.stride(0) for t in (bases, bias)
        )
        self.launch(
            em_e_step, batch * num_tiles,
            self.feats, bases, bias, self.z, self.colsum,
            positions, num_tiles, *self.feats.stride(), stride_bases_b, stride_bias_b,
            **self.shape, HAS_BIAS=bias is not None, **self.z_scale, **self.channels_last,
        )  # fmt: skip

    def m_step(self, bases: Tensor, mass: Tensor | None = None) -> None:
        """Write new bases [B, K, C]; given mass [B, K], write it too and skip the L2 norm."""
        batch, positions, channels = self.feats.shape
        num_splits = self.partial.shape[1]
        num_blocks = cdiv(channels, self.tile("em_m_step").meta["BLOCK_C"])
        self.launch(
            em_m_step, batch * num_splits * num_blocks,
            self.feats, self.z, self.partial, positions, num_splits, *self.feats.stride(),
            **self.shape, SPLIT=self.split, **self.z_scale, **self.channels_last,
        )  # fmt: skip
        self.launch(
            em_reduce, batch * self.shape["K"],
            self.partial, self.colsum, bases, mass,
            num_splits, self.colsum.shape[2], self.norm_shift,
            **self.shape, NORMALISE=mass is None,
        )  # fmt: skip

    def reconstruct(self, bases: Tensor) -> Tensor:
        batch, positions, channels = self.feats.shape
        meta = self.tile("em_reconstruct").meta
        num_tiles = cdiv(positions, meta["BLOCK_N"])
        num_blocks = cdiv(channels, meta["BLOCK_C"])
        out = torch.empty_like(self.feats)
        self.launch(
            em_reconstruct, batch * num_tiles * num_blocks,
            self.z, bases, out, positions, num_tiles, *out.stride(),
            **self.shape, PADDED_K=self.z.shape[2], **self.z_scale,
        )  # fmt: skip
        return out


@with_fitting_tiles
def run_attention(
    feats: Tensor, bases: Tensor, num_stages: int, norm_shift: float, precision: str
) -> tuple[Tensor, Tensor]:
    """feats [B, N, C], bases [1 or B, C, K] → reconstruction [B, N, C], new bases [B, C, K]."""
    stages = Stages(feats, bases.shape[2], precision, norm_shift)
    old = bases.transpose(1, 2).to(feats.dtype).contiguous()
    new = feats.new_empty(feats.shape[0], *old.shape[1:])
    for _ in range(num_stages):
        stages.e_step(old)
        stages.m_step(new)
        old = new
    return stages.reconstruct(new), new.transpose(1, 2)
