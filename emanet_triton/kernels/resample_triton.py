"""Labels, probabilities and confusion matrices from low-resolution logits, in Triton.

A program takes a run of pixels of one output row, or of a few, one after another. The taps along
rows are scalars, and a thread holds all classes of its pixel, so neither the softmax nor the
maximum needs other threads. Offsets and weights are those of ``resample.Taps``. All arithmetic
is float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# A thread a pixel. Labels: one warp, so that no tap waits for other warps, and rows enough to make
# starting a program cheap beside its work. Probabilities: what compiles without spills.
TILES = {
    ("cuda", "labels"): {"BLOCK_W": 32, "ROWS": 8, "num_warps": 1},
    ("cuda", "probabilities"): {"BLOCK_W": 128, "ROWS": 1, "num_warps": 4},
    ("hip", "labels"): {"BLOCK_W": 64, "ROWS": 8, "num_warps": 1},
    ("hip", "probabilities"): {"BLOCK_W": 256, "ROWS": 1, "num_warps": 4},
}
CONFUSION_TILE = {"BLOCK": 4096, "num_warps": 4}
IGNORE = tl.constexpr(255)


@triton.jit
def interpolate(
    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    i_view, i_row, o_w, H, W, P, row_taps, column_taps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Logits of one view at pixels ``o_w`` of an output row, [BLOCK_C, BLOCK_W]."""
    o_c = tl.arange(0, BLOCK_C)
    p_c = logits_ptr + (o_c.to(tl.int64) * P)[:, None]
    b_logits = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
    for t_c in range(column_taps):
        o_t = (i_view * column_taps + t_c) * W + o_w
        w_c = tl.load(column_weight_ptr + o_t, mask=o_w < W, other=0.0)
        if tl.max(w_c, 0) > 0.0:  # a table has as many taps as its most demanding output
            x_c = tl.load(column_index_ptr + o_t, mask=o_w < W, other=0)
            for t_r in range(row_taps):
                o_r = (i_view * row_taps + t_r) * H + i_row
                w_r = tl.load(row_weight_ptr + o_r)
                if w_r > 0.0:
                    o_p = tl.load(row_index_ptr + o_r) + x_c
                    b_tap = tl.load(p_c + o_p[None, :], mask=(o_c < C)[:, None], other=0.0)
                    b_logits += (w_r * w_c)[None, :] * b_tap.to(tl.float32)
    return tl.where((o_c < C)[:, None], b_logits, float("-inf"))


@triton.jit
def resample_kernel(
    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    labels_ptr, probabilities_ptr, H, W, P, num_views, row_taps, column_taps,
    C: tl.constexpr, SOFTMAX: tl.constexpr, PROBABILITIES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores of all classes, summed over the views, and their first maximum.

    logits [B, C, P]; tables [num_views, taps, H or W]; labels uint8 [B, H, W]; with
    PROBABILITIES float32 [B, C, H, W]. Without SOFTMAX, for a single view, scores are logits.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_w = tl.max_contiguous(o_w, 1)  # else wide stores would give a thread several pixels
    o_c = tl.arange(0, BLOCK_C)
    logits_ptr += i_b * C * P

    begin = tl.program_id(1) * ROWS
    for i_row in range(begin, tl.minimum(begin + ROWS, H)):
        b_scores = tl.zeros([BLOCK_C, BLOCK_W], tl.float32)
        for i_view in range(num_views):
            b_logits = interpolate(
                logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
                i_view, i_row, o_w, H, W, P, row_taps, column_taps, C, BLOCK_C, BLOCK_W,
            )  # [BLOCK_C, BLOCK_W]  # fmt: skip
            if SOFTMAX:
                b_exp = tl.exp(b_logits - tl.max(b_logits, 0)[None, :])
                b_scores += b_exp * (1.0 / tl.sum(b_exp, 0))[None, :]
            else:
                b_scores += b_logits

        b_labels = tl.argmax(b_scores, 0)  # the first maximum
        tl.store(labels_ptr + (i_b * H + i_row) * W + o_w, b_labels.to(tl.uint8), mask=o_w < W)
        if PROBABILITIES:
            p_out = probabilities_ptr + ((i_b * C + o_c)[:, None] * H + i_row) * W + o_w[None, :]
            tl.store(
                p_out, b_scores * (1.0 / num_views), mask=(o_c < C)[:, None] & (o_w < W)[None, :]
            )


@triton.jit
def confusion_kernel(
    targets_ptr, labels_ptr, counts_ptr, num_pixels,
    C: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the pairs of a run of pixels to counts, int64 [C * C + 1]; last those of no class."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_target = tl.load(targets_ptr + o_n, mask=o_n < num_pixels, other=IGNORE).to(tl.int32)
    b_label = tl.load(labels_ptr + o_n, mask=o_n < num_pixels, other=0).to(tl.int32)
    b_bin = tl.where((b_target < C) & (b_label < C), b_target * C + b_label, C * C)
    b_bin = tl.where(b_target == IGNORE, C * C + 1, b_bin)  # a bin that is not stored
    b_count = tl.histogram(b_bin, BINS)
    o_bin = tl.arange(0, BINS)
    m_bin = (o_bin <= C * C) & (b_count > 0)
    tl.atomic_add(counts_ptr + o_bin, b_count.to(tl.int64), mask=m_bin)


INTERPRETED = not isinstance(resample_kernel, triton.runtime.JITFunction)


def resample(
    logits: Tensor, tables: Sequence[Tensor], *, probabilities: bool
) -> tuple[Tensor, Tensor | None]:
    """Labels, uint8 [B, H, W], and if asked for mean probabilities, float32 [B, C, H, W].

    Args:
        logits: [B, C, P].
        tables: index and weight of the rows, then of the columns.
        probabilities: whether to return them, too.
    """
    (B, C, P), (V, T_r, H), (_, T_c, W) = logits.shape, tables[0].shape, tables[2].shape
    labels = torch.empty((B, H, W), dtype=torch.uint8, device=logits.device)
    mean = None
    if probabilities:
        mean = torch.empty((B, C, H, W), dtype=torch.float32, device=logits.device)
    backend = "hip" if torch.version.hip else "cuda"
    tile = TILES[backend, "probabilities" if probabilities else "labels"]
    resample_kernel[triton.cdiv(W, tile["BLOCK_W"]), triton.cdiv(H, tile["ROWS"]), B](
        logits.contiguous(), *(table.contiguous() for table in tables), labels, mean,
        H, W, P, V, T_r, T_c,
        C=C, SOFTMAX=probabilities or V > 1, PROBABILITIES=probabilities,
        BLOCK_C=32 if C <= 32 else 64, **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return labels, mean


def confusion(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of each (target, label) pair, int64 [C * C + 1]; the last of what is no class."""
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=labels.device)
    confusion_kernel[(triton.cdiv(labels.numel(), CONFUSION_TILE["BLOCK"]),)](
        targets.contiguous(), labels.contiguous(), counts, labels.numel(),
        C=num_classes, BINS=triton.next_power_of_2(num_classes**2 + 2), **CONFUSION_TILE,
        enable_fp_fusion=True,
    )  # fmt: skip
    return counts
