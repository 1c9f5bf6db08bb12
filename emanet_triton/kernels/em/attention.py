"""EM attention in Triton: the launches of its stages, and the reconstruction.

Index letters: b image, n position, c channel, k base.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.device import DTYPE_NAMES, gpu_arch
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.em.steps import backwards, em_e_step, em_m_step, em_reduce
from emanet_triton.kernels.launch import cdiv, fitting, launch, with_fitting_tiles
from emanet_triton.kernels.tape import taped
from emanet_triton.kernels.tile import Tile

# float16 holds numbers down to 2^-24 only. Scaled by 2^15, responsibilities reach down to 2^-39.
Z_SCALES = {torch.bfloat16: 1.0, torch.float16: 2.0**15, torch.float32: 1.0}
REDUCED = 128  # channels that a program of em_reduce sums if no norm needs them all


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
    pid = backwards()
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


INTERPRETED = not isinstance(em_reconstruct, triton.JITFunction)


class Bases(NamedTuple):
    """The bases that an E step multiplies features by.

    Attributes:
        rows: [1 or B, K, C], in the features' dtype.
        bias: what is added to the logits, float32 [1 or B, K]; with ``square`` its parts.
        square: parts of the squared norms that the bases are yet to be divided by, float32
            [parts, B * K], or None. See ``em_project``.
        size: what ``rows`` were divided by already, float32 [B * K], or None.
    """

    rows: Tensor
    bias: Tensor | None = None
    square: Tensor | None = None
    size: Tensor | None = None


class Stages:
    """The launches of one EM run on features of one shape, and their workspace.

    Args:
        feats: [B, N, C], any strides.
        num_bases: K.
        precision: how float32 features are multiplied.
        norm_shift: added to both norms of an M step.
        ranges: into how many ranges of positions an image is cut at most if ``em_stage`` computes E
            and M step in one pass; then a tensor descriptor must take the features. None for a
            kernel of each step.
    """

    def __init__(
        self,
        feats: Tensor,
        num_bases: int,
        precision: str,
        norm_shift: float,
        ranges: int | None = None,
    ) -> None:
        batch, positions, channels = feats.shape
        channels_last = feats.stride(2) == 1
        self.feats = feats
        self.norm_shift = float(norm_shift)  # an integer would make another kernel
        self.shape: dict[str, Any] = {"C": channels, "K": num_bases}
        self.z_scale: dict[str, Any] = {"Z_SCALE": Z_SCALES[feats.dtype]}
        self.channels_last = {"CHANNELS_LAST": channels_last}
        # Kernels overlap on the GPUs that have one pass. Triton's interpreter cannot wait.
        overlap = ranges is not None and not INTERPRETED
        self.overlap = {"OVERLAP": overlap, "waits": overlap}
        self._has_begun = False
        self._tile = functools.partial(
            tiles.tile, arch=gpu_arch(feats.device), dtype=DTYPE_NAMES[feats.dtype],
            num_bases=num_bases, channels_last=channels_last, precision=precision,
        )  # fmt: skip
        self.z = feats.new_empty(batch, positions, tiles.pad_bases(num_bases))
        self._hopper: Any = None
        if ranges is None:
            self.split = tiles.split_length(positions)
            num_tiles = cdiv(positions, self.tile("em_e_step").meta["BLOCK_N"])
        else:
            # Gluon is experimental: where Triton has another one, the other kernels still run.
            self._hopper = importlib.import_module("emanet_triton.kernels.em.hopper")
            block_n = self.tile("em_stage").meta["BLOCK_N"]
            self.split = tiles.range_length(positions, ranges, block_n)
            num_tiles = cdiv(positions, self.split)
            self._rows = tuple(self._hopper.rows_of(t, block_n) for t in (feats, self.z))
        num_splits = cdiv(positions, self.split)
        self.colsum = feats.new_empty(batch, num_bases, num_tiles, dtype=torch.float32)
        partial = batch, num_splits, num_bases, channels
        self.partial = feats.new_empty(partial, dtype=torch.float32)

    def tile(self, kernel: str, channels: int | None = None) -> Tile:
        """The tile of a kernel, for all channels or for fewer."""
        tile = self._tile(kernel, channels=channels or self.shape["C"])
        return fitting(tile, self.feats.device)

    def launch(
        self, kernel, programs: int, *arguments, channels: int | None = None, waits: bool = False,
        **constants,
    ) -> None:  # fmt: skip
        """Launch a kernel with its tile, for all channels or for fewer; raises as ``launch`` does.

        One that ``waits`` itself for the end of the kernel before it may start earlier. The first
        kernel may not: ``em_stage`` would load features that an earlier kernel may still write.
        """
        if waits:
            constants["launch_pdl"] = self._has_begun
        tile = self.tile(kernel.__name__, channels)
        launch(kernel, tile, self.feats.device, programs, *arguments, **constants)
        self._has_begun = True

    def stage(self, old: Bases, new: Tensor, mass: Tensor | None = None, *, left: int) -> None:
        """E and M step: write new bases [B, K, C]; given mass [B, K], write sums instead.

        Sums are divided by the L1 norms only, and mass is what is left of these norms. ``left`` is
        the number of stages that follow.
        """
        batch, positions, channels = self.feats.shape
        num_tiles, num_splits = self.colsum.shape[2], self.partial.shape[1]
        bases = batch * self.shape["K"], self.norm_shift
        options = {
            **self.shape,
            "HAS_BIAS": old.bias is not None,
            "PARTS": 0 if old.square is None else old.square.shape[0],
            **self.z_scale,
        }
        step_bases_b = 0 if old.rows.shape[0] == 1 else 1
        stride_bases_b = step_bases_b * old.rows.stride(0)
        stride_bias_b = 0 if old.bias is None else step_bases_b * old.bias.stride(0)
        if self._hopper:
            programs = batch * num_splits
            rows, *others = old
            self.launch(
                self._hopper.em_stage, programs,
                self._rows[0], self._hopper.rows_of(rows, self.z.shape[2]), *others, self._rows[1],
                self.partial, self.colsum, positions, self.split, num_splits,
                # The epilogue goes backwards, and each stage the other way than the next.
                (programs - 1) * (left % 2),
                *bases, step_bases_b, stride_bias_b, **options, STORE_Z=left == 0,
                waits=True,
            )  # fmt: skip
        else:
            self.launch(
                em_e_step, batch * num_tiles,
                self.feats, *old, self.z, self.colsum, positions, num_tiles, *bases,
                *self.feats.stride(), stride_bases_b, stride_bias_b,
                **options, **self.channels_last,
            )  # fmt: skip
            num_blocks = cdiv(channels, self.tile("em_m_step").meta["BLOCK_C"])
            self.launch(
                em_m_step, batch * num_splits * num_blocks,
                self.feats, self.z, self.partial, positions, num_splits, *self.feats.stride(),
                **self.shape, SPLIT=self.split, **self.z_scale, **self.channels_last,
            )  # fmt: skip
        # The L2 norm needs all channels at once. Without it more programs share the work.
        together = channels if mass is None else min(channels, REDUCED)
        tile = self.tile("em_reduce", together)
        programs = batch * self.shape["K"] * cdiv(channels, tile.meta["BLOCK_C"])
        self.launch(
            em_reduce, programs,
            self.partial, self.colsum, new, mass, num_splits, num_tiles, self.norm_shift,
            **self.shape, NORMALISE=mass is None, **self.overlap, channels=together,
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


@taped
@with_fitting_tiles
def run_attention(
    feats: Tensor,
    bases: Tensor,
    num_stages: int,
    norm_shift: float,
    precision: str,
    ranges: int | None = None,
) -> tuple[Tensor, Tensor]:
    """feats [B, N, C], bases [1 or B, C, K] → reconstruction [B, N, C], new bases [B, C, K].

    ``ranges`` is that of ``Stages``.
    """
    stages = Stages(feats, bases.shape[2], precision, norm_shift, ranges)
    old = bases.transpose(1, 2).to(feats.dtype).contiguous()
    new = feats.new_empty(feats.shape[0], *old.shape[1:])
    for left in reversed(range(num_stages)):
        stages.stage(Bases(old), new, left=left)
        old = new
    return stages.reconstruct(new), new.transpose(1, 2)
