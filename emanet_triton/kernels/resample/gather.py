"""Labels, probabilities and confusion matrices from low-resolution logits, in Triton.

A program takes a run of pixels of one output row, or of a few rows one after another. The taps
along rows are scalars. A softmax needs all classes of a pixel at once: one thread holds them, or
several for many classes, so that it hardly waits for other threads. A maximum alone takes blocks of
classes one after another. ``op.Taps`` describes offsets and weights. All arithmetic is float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.launch import cdiv

# A program is one warp, so that no tap waits for other warps. For labels a program takes several
# rows, so that its start is cheap beside its work.
ROWS = {"labels": 8, "probabilities": 1}
CONFUSION_TILE = {"BLOCK": 4096, "num_warps": 4}
MOST_OFFSETS = 2**31  # the number of offsets that 32 bits can hold
MOST_BINS = 1024  # bins of a histogram; more bins spill in Triton 3.6 and 3.7
# Neighbouring threads must have neighbouring pixels. If neither axis is contiguous, Triton 3.6
# spreads the first over the threads, and later versions the last.
CLASS_AXIS = 1 if triton.__version__.startswith("3.6.") else 0
IGNORE = tl.constexpr(255)


@triton.jit
def interpolate(
    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    b_logits, i_view, i_row, o_w, o_c, H, W, P, row_taps, column_taps,
    C: tl.constexpr, CLASS_AXIS: tl.constexpr,
):  # fmt: skip
    """One view's logits of classes ``o_c`` at pixels ``o_w`` of a row, added to a tile of zeros."""
    for t_c in range(column_taps):
        o_t = (i_view * column_taps + t_c) * W + o_w
        w_c = tl.load(column_weight_ptr + o_t, mask=o_w < W, other=0.0)
        if tl.max(w_c, 0) > 0.0:  # a table has as many taps as its most demanding output
            x_c = tl.load(column_index_ptr + o_t, mask=o_w < W, other=0)
            for t_r in range(row_taps):
                o_r = (i_view * row_taps + t_r) * H + i_row
                w_r = tl.load(row_weight_ptr + o_r)
                if w_r > 0.0:
                    o_p = tl.expand_dims(tl.load(row_index_ptr + o_r) + x_c, CLASS_AXIS)
                    b_tap = tl.load(logits_ptr + (o_c * P + o_p), mask=o_c < C, other=0.0)
                    b_logits += tl.expand_dims(w_r * w_c, CLASS_AXIS) * b_tap.to(tl.float32)
    return tl.where(o_c < C, b_logits, float("-inf"))


@triton.jit
def resample_kernel(
    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    labels_ptr, probabilities_ptr, H, W, P, num_views, row_taps, column_taps,
    C: tl.constexpr, SOFTMAX: tl.constexpr, PROBABILITIES: tl.constexpr, WIDE: tl.constexpr,
    CLASS_AXIS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores of all classes, summed over the views, and their first maximum.

    logits [B, C, P]; tables [num_views, taps, H or W]; labels uint8 [B, H, W]; with
    PROBABILITIES float32 [B, C, H, W]. With SOFTMAX scores are probabilities, else logits. Both
    SOFTMAX and PROBABILITIES need all classes in one block. WIDE says that offsets of an image need
    64 bits. Tiles are [BLOCK_C, BLOCK_W], or the other way round with CLASS_AXIS 1.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_w = tl.max_contiguous(o_w, 1)  # else wide stores would give a thread several pixels
    o_x = tl.expand_dims(o_w, CLASS_AXIS)
    o_block = tl.expand_dims(tl.arange(0, BLOCK_C), 1 - CLASS_AXIS)
    if WIDE:
        o_block = o_block.to(tl.int64)
    b_zero = tl.zeros(tl.broadcast(o_block, o_x)[0].shape, tl.float32)
    logits_ptr += i_b * C * P

    begin = tl.program_id(1) * ROWS
    for i_row in range(begin, tl.minimum(begin + ROWS, H)):
        b_best = tl.full([BLOCK_W], float("-inf"), tl.float32)
        b_labels = tl.zeros([BLOCK_W], tl.int32)
        for first in range(0, C, BLOCK_C):
            o_c = first + o_block
            b_scores = b_zero
            for i_view in range(num_views):
                b_logits = interpolate(
                    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr,
                    column_weight_ptr, b_zero, i_view, i_row, o_w, o_c, H, W, P,
                    row_taps, column_taps, C, CLASS_AXIS,
                )  # fmt: skip
                if SOFTMAX:
                    b_exp = tl.exp(b_logits - tl.max(b_logits, CLASS_AXIS, keep_dims=True))
                    b_scores += b_exp * (1.0 / tl.sum(b_exp, CLASS_AXIS, keep_dims=True))
                else:
                    b_scores += b_logits

            b_max, b_first = tl.max(b_scores, CLASS_AXIS, return_indices=True)  # the first maximum
            b_labels = tl.where(b_max > b_best, first + b_first, b_labels)
            b_best = tl.maximum(b_max, b_best)
            if PROBABILITIES:
                b_mean = b_scores * (1.0 / num_views)
                if not SOFTMAX:
                    b_exp = tl.exp(b_mean - tl.max(b_mean, CLASS_AXIS, keep_dims=True))
                    b_mean = b_exp * (1.0 / tl.sum(b_exp, CLASS_AXIS, keep_dims=True))
                p_row = probabilities_ptr + (i_b * C * H + i_row) * W
                tl.store(p_row + (o_c * (H * W) + o_x), b_mean, mask=(o_c < C) & (o_x < W))
        tl.store(labels_ptr + (i_b * H + i_row) * W + o_w, b_labels.to(tl.uint8), mask=o_w < W)


@triton.jit
def confusion_kernel(
    targets_ptr, labels_ptr, counts_ptr, num_pixels,
    C: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the pairs of a run of pixels in counts, int64 [C * C + 1]; the last is for no class.

    A program counts BINS - 1 kinds of pairs; its last bin is for all other pairs.
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * (BINS - 1)
    b_target = tl.load(targets_ptr + o_n, mask=o_n < num_pixels, other=IGNORE).to(tl.int32)
    b_label = tl.load(labels_ptr + o_n, mask=o_n < num_pixels, other=0).to(tl.int32)
    b_pair = tl.where((b_target < C) & (b_label < C), b_target * C + b_label, C * C)
    m_pair = (b_target != IGNORE) & (b_pair >= first) & (b_pair < first + BINS - 1)
    b_count = tl.histogram(tl.where(m_pair, b_pair - first, BINS - 1), BINS)
    o_bin = tl.arange(0, BINS)
    m_bin = (o_bin < BINS - 1) & (first + o_bin <= C * C) & (b_count > 0)
    tl.atomic_add(counts_ptr + first + o_bin, b_count.to(tl.int64), mask=m_bin)


INTERPRETED = not isinstance(resample_kernel, triton.runtime.JITFunction)


def resample(
    logits: Tensor, tables: Sequence[Tensor], *, average: str, probabilities: bool
) -> tuple[Tensor, Tensor | None]:
    """Labels, uint8 [B, H, W], and probabilities, float32 [B, C, H, W], or None.

    Args:
        logits: [B, C, P].
        tables: index and weight of the rows, then of the columns.
        average: of the views' ``"probabilities"`` or ``"logits"``.
        probabilities: whether to return probabilities.
    """
    (B, C, P), (V, T_r, H), (_, T_c, W) = logits.shape, tables[0].shape, tables[2].shape
    labels = torch.empty((B, H, W), dtype=torch.uint8, device=logits.device)
    mean = None
    if probabilities:
        mean = torch.empty((B, C, H, W), dtype=torch.float32, device=logits.device)
    wide = C * max(P, H * W if probabilities else 0) >= MOST_OFFSETS
    softmax = average == "probabilities" and (probabilities or V > 1)
    block_c = max(32, triton.next_power_of_2(C)) if softmax or probabilities else 32
    # A thread has 32 classes of its pixel, or 64 where its registers suffice.
    threads = block_c // 32 if block_c > 64 or probabilities or wide else 1
    block_w = (64 if torch.version.hip else 32) // threads
    rows = ROWS["probabilities" if probabilities else "labels"]
    # NVIDIA's assembler spills registers of many tiles, so that more programs fit, unless it has a
    # limit. Labels of few classes spill none, and need fewer registers without a limit.
    limit = {}
    if (probabilities or C > 19) and not torch.version.hip:
        few = 19 if probabilities else 32
        limit["maxnreg"] = 96 if few >= C else 255
    resample_kernel[cdiv(W, block_w), cdiv(H, rows), B](
        logits.contiguous(), *(table.contiguous() for table in tables), labels, mean,
        H, W, P, V, T_r, T_c,
        C=C, SOFTMAX=softmax, PROBABILITIES=probabilities, WIDE=wide, CLASS_AXIS=CLASS_AXIS,
        BLOCK_C=block_c, BLOCK_W=block_w, ROWS=rows, num_warps=1, enable_fp_fusion=True, **limit,
    )  # fmt: skip
    return labels, mean


def confusion(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of each (target, label) pair, then of pixels without a class: int64 [C * C + 1]."""
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=labels.device)
    bins = min(MOST_BINS, triton.next_power_of_2(num_classes**2 + 2))
    blocks = cdiv(labels.numel(), CONFUSION_TILE["BLOCK"]), cdiv(num_classes**2 + 1, bins - 1)
    confusion_kernel[blocks](
        targets.contiguous(), labels.contiguous(), counts, labels.numel(),
        C=num_classes, BINS=bins, **CONFUSION_TILE, enable_fp_fusion=True,
    )  # fmt: skip
    return counts
