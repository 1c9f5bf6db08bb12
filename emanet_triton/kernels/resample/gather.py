"""Labels, probabilities and confusion matrices from low-resolution logits, in Triton.

A program takes a run of output rows, from top to bottom, and a few columns. It loads the
low-resolution rows that an output row needs, interpolates them to its columns, and holds them in
registers. The next output row mostly needs the same rows, so only the sum over these remains: when
a network's stride is 8, about one output row in 8 loads logits. A single view gives labels row by
row. Of several views each visits all rows of a short run before the next view; the scores of the
run stay in registers, too.

A thread holds all classes of its pixel, or several threads share many classes. ``op.Taps``
describes offsets and weights. All arithmetic is float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emanet_triton.kernels.launch import cdiv
from emanet_triton.kernels.relaunch import start
from emanet_triton.kernels.tape import taped

# Rows of a program's run. More rows share more loads, but fewer programs fill a GPU less evenly,
# and scores of several views need registers for each row.
ROWS = {"single": 16, "views": 4, "probabilities": 1}
MOST_RUNS = 2**16 - 1  # programs along a grid's second axis; taller images get longer runs
# A network of stride 8 with ``align_corners=False`` goes on to the next low-resolution row after
# output rows 3, 11, 19...: runs of a single view begin there, too.
PHASE = tl.constexpr(4)
# A program holds the rows of so many taps: four where two windows overlap. A third tap is rare in
# several views, which need the registers for scores.
HELD = {"single": 4, "views": 2}
THREAD_CLASSES = 21  # most classes of a thread
NO_ROW = tl.constexpr(-(2**31))  # no offset of a row: a column's offset cannot make it a position
LOG2_E = tl.constexpr(1.4426950408889634)
CONFUSION_TILE = {"BLOCK": 4096, "num_warps": 4}
MOST_BINS = 1024  # bins of a histogram; more bins spill in Triton 3.6 and 3.7
# Neighbouring threads must have neighbouring pixels. If neither axis is contiguous, Triton 3.6
# spreads the first over the threads, and later versions the last.
CLASS_AXIS = 1 if triton.__version__.startswith("3.6.") else 0
IGNORE = tl.constexpr(255)


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """The tuple with another value at ``i``."""
    out = ()
    for k in tl.static_range(len(values)):
        out += (value if k == i else values[k],)  # type: ignore[assignment]
    return out


@triton.jit
def same(a, b):
    """Whether two tuples of scalars are equal."""
    equal = a[0] == b[0]
    for k in tl.static_range(1, len(a)):
        equal &= a[k] == b[k]
    return equal


@triton.jit
def row_tap(rows, i_view, t, i_row):
    """Offset and weight of a tap of an output row; the offset is NO_ROW where the weight is 0."""
    index_ptr, weight_ptr, H, taps = rows
    o_t = (i_view * taps + t) * H + i_row
    weight = tl.load(weight_ptr + o_t)
    offset = tl.load(index_ptr + o_t)
    is_used = weight.to(tl.int32, bitcast=True) > 0  # integers compare in fewer instructions
    return tl.where(is_used, offset, NO_ROW), weight


@triton.jit
def row_taps(rows, i_view, i_row, HELD: tl.constexpr):
    """Offsets and weights of the first HELD taps of an output row."""
    offsets, weights = (), ()
    for t in tl.static_range(HELD):
        offset, weight = row_tap(rows, i_view, t, i_row)
        offsets += (offset,)  # type: ignore[assignment]
        weights += (weight,)  # type: ignore[assignment]
    return offsets, weights


@triton.jit
def across(
    b_rows, offsets, wanted, logits, columns, i_view, o_w, o_c, factor, CLASS_AXIS: tl.constexpr
):
    """Add to tiles the low-resolution rows at ``offsets``, interpolated to columns ``o_w``.

    A row that is not wanted is neither loaded nor added. The factor multiplies all weights.
    """
    logits_ptr, P, C = logits
    index_ptr, weight_ptr, W, taps = columns
    for t_c in range(taps):
        o_t = (i_view * taps + t_c) * W + o_w
        weight = tl.load(weight_ptr + o_t, mask=o_w < W, other=0.0)
        p_c = logits_ptr + tl.load(index_ptr + o_t, mask=o_w < W, other=0)
        # A table has as many taps as its most demanding output.
        if tl.max((weight > 0.0).to(tl.int32), 0) > 0:
            w_c = tl.expand_dims(weight * factor, CLASS_AXIS)
            # The stride is always P. If the compiler knew this, it would keep the offsets of all
            # classes in registers, which the rows need.
            stride = tl.where(weight >= 0.0, P, 0).to(tl.int64)
            o_class = o_c * tl.expand_dims(stride, CLASS_AXIS)
            for t in tl.static_range(len(b_rows)):
                if wanted[t]:
                    p_tap = tl.expand_dims(p_c + offsets[t], CLASS_AXIS) + o_class
                    b_tap = tl.load(p_tap, mask=o_c < C, other=0.0).to(tl.float32)
                    b_rows = replaced(b_rows, t, b_rows[t] + w_c * b_tap)
    return b_rows


@triton.jit
def hold(
    b_held, held, offsets, b_zero, logits, columns, i_view, o_w, o_c, CLASS_AXIS: tl.constexpr
):
    """The rows at ``offsets``, given those at ``held``; zeros in place of a row at NO_ROW.

    A row that stays is not loaded again. Neither is the row that the next tap held: as outputs go
    down, the lower row of a bilinear tap becomes the upper one.
    """
    wanted, any_wanted = (), False
    b_before = b_held
    for t in tl.static_range(len(held)):
        is_new = offsets[t] != held[t]
        want = is_new & (offsets[t] != NO_ROW)
        if is_new:
            b_held = replaced(b_held, t, b_zero)
        if t + 1 < len(held):
            if is_new & (offsets[t] == held[t + 1]):
                b_held = replaced(b_held, t, b_before[t + 1])
            want = want & (offsets[t] != held[t + 1])
        wanted += (want,)  # type: ignore[assignment]
        any_wanted = want | any_wanted
    if any_wanted:
        b_held = across(b_held, offsets, wanted, logits, columns, i_view, o_w, o_c, 1.0, CLASS_AXIS)
    return b_held


@triton.jit
def down(
    b_held, weights, logits, rows, columns, i_view, i_row, o_w, o_c, scale,
    CLASS_AXIS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Logits of an output row, times a scale, from the held rows; MORE taps are not held."""
    C = logits[2]
    b_logits = b_held[0] * (weights[0] * scale)
    for t in tl.static_range(1, len(b_held)):
        b_logits += b_held[t] * (weights[t] * scale)
    if MORE:
        for t in range(len(b_held), rows[3]):
            offset, weight = row_tap(rows, i_view, t, i_row)
            if weight > 0.0:
                b_logits = across(
                    (b_logits,), (offset,), (weight > 0.0,), logits, columns, i_view, o_w, o_c,
                    weight * scale, CLASS_AXIS,
                )[0]  # fmt: skip
    return tl.where(o_c < C, b_logits, float("-inf"))


@triton.jit
def softmax(b_logits, o_c, C, CLASS_AXIS: tl.constexpr):
    """2 to the power of the logits, over their sum."""
    b_exp = tl.exp2(b_logits - tl.max(b_logits, CLASS_AXIS, keep_dims=True))
    # Adding -0.0 is no operation, so the compiler leaves out classes that do not exist.
    b_exp = tl.where(o_c < C, b_exp, -0.0)
    return b_exp * (1.0 / tl.sum(b_exp, CLASS_AXIS, keep_dims=True))


@triton.jit
def first_maximum(b_scores, CLASS_AXIS: tl.constexpr):
    """The first class with the largest score; 0 if that is -inf or NaN."""
    b_max, b_first = tl.max(b_scores, CLASS_AXIS, return_indices=True)
    return tl.where(b_max > float("-inf"), b_first, 0).to(tl.uint8)


@triton.jit
def resample_kernel(
    logits_ptr, row_index_ptr, row_weight_ptr, column_index_ptr, column_weight_ptr,
    labels_ptr, probabilities_ptr, H, W, P, num_views, num_row_taps, num_column_taps,
    C: tl.constexpr, SINGLE: tl.constexpr, SOFTMAX: tl.constexpr, PROBABILITIES: tl.constexpr,
    CLASS_AXIS: tl.constexpr, HELD: tl.constexpr, MORE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores of all classes, summed over the views, and their first maximum.

    logits [B, C, P]; tables [num_views, taps, H or W]; labels uint8 [B, H, W]; with
    PROBABILITIES float32 [B, C, H, W]. With SOFTMAX scores are probabilities, else logits. Tiles
    are [BLOCK_C, BLOCK_W], or the other way round with CLASS_AXIS 1. A program holds the rows of
    the first HELD taps; MORE says that there are more taps. SINGLE says that there is one view and
    that its probabilities are not wanted.
    """
    i_b = tl.program_id(2).to(tl.int64)
    o_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_w = tl.max_contiguous(o_w, 1)  # else wide stores would give a thread several pixels
    o_x = tl.expand_dims(o_w, CLASS_AXIS)
    o_c = tl.expand_dims(tl.arange(0, BLOCK_C), 1 - CLASS_AXIS)
    b_zero = tl.zeros(tl.broadcast(o_c, o_x)[0].shape, tl.float32)
    begin = tl.program_id(1) * ROWS
    if SINGLE:
        begin -= PHASE
    end = tl.minimum(begin + ROWS, H)

    logits = (logits_ptr + i_b * C * P, P, C)
    rows = (row_index_ptr, row_weight_ptr, H, num_row_taps)
    columns = (column_index_ptr, column_weight_ptr, W, num_column_taps)

    if SINGLE:
        b_held, held = (b_zero,) * HELD, (NO_ROW,) * HELD
        i_row = tl.maximum(begin, 0)
        while i_row < end:
            offsets, weights = row_taps(rows, 0, i_row, HELD)
            if not same(offsets, held):
                b_held = hold(
                    b_held, held, offsets, b_zero, logits, columns, 0, o_w, o_c, CLASS_AXIS
                )
                held = offsets
            b_logits = down(
                b_held, weights, logits, rows, columns, 0, i_row, o_w, o_c, 1.0,
                CLASS_AXIS, MORE,
            )  # fmt: skip
            p_row = labels_ptr + (i_b * H + i_row) * W
            tl.store(p_row + o_w, first_maximum(b_logits, CLASS_AXIS), mask=o_w < W)
            i_row += 1
    else:
        scale = LOG2_E if SOFTMAX else 1.0
        b_scores = (b_zero,) * ROWS
        for i_view in range(num_views):
            b_held, held = (b_zero,) * HELD, (NO_ROW,) * HELD
            i_row = begin
            while i_row < end:
                offsets, _ = row_taps(rows, i_view, i_row, HELD)
                b_held = hold(
                    b_held, held, offsets, b_zero, logits, columns, i_view, o_w, o_c, CLASS_AXIS
                )
                held = offsets
                for r in tl.static_range(ROWS):
                    if (begin + r == i_row) & (i_row < end):
                        offsets, weights = row_taps(rows, i_view, i_row, HELD)
                        if same(offsets, held):
                            b_logits = down(
                                b_held, weights, logits, rows, columns, i_view, i_row,
                                o_w, o_c, scale, CLASS_AXIS, MORE,
                            )  # fmt: skip
                            if SOFTMAX:
                                b_logits = softmax(b_logits, o_c, C, CLASS_AXIS)
                            b_scores = replaced(b_scores, r, b_scores[r] + b_logits)
                            i_row += 1
        for r in tl.static_range(ROWS):
            i_row = begin + r
            if i_row < end:
                b_sum = tl.where(o_c < C, b_scores[r], float("-inf"))
                p_row = labels_ptr + (i_b * H + i_row) * W
                tl.store(p_row + o_w, first_maximum(b_sum, CLASS_AXIS), mask=o_w < W)
                if PROBABILITIES:
                    b_mean = b_sum * (1.0 / num_views)
                    if not SOFTMAX:
                        b_mean = softmax(b_mean * LOG2_E, o_c, C, CLASS_AXIS)
                    p_row = probabilities_ptr + (i_b * C * H + i_row) * W
                    o_mean = o_c.to(tl.int64) * H * W + o_x
                    tl.store(p_row + o_mean, b_mean, mask=(o_c < C) & (o_x < W))


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


@taped
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
    single = V == 1 and not probabilities
    use = "probabilities" if probabilities else "single" if single else "views"
    held = min(T_r, HELD["single" if V == 1 else "views"])  # of labels and probabilities the same
    threads = triton.next_power_of_2(cdiv(C, THREAD_CLASSES))
    block_w = (64 if torch.version.hip else 32) // threads
    length, height = ROWS[use], H + single * PHASE.value
    while cdiv(height, length) > MOST_RUNS:
        length *= 2
    limit = {}
    if not torch.version.hip:
        limit["maxnreg"] = registers(use, held, T_r > held, C, logits.dtype.itemsize)
    constants = {
        "C": C, "SINGLE": single, "SOFTMAX": average == "probabilities" and not single,
        "PROBABILITIES": probabilities, "CLASS_AXIS": CLASS_AXIS, "HELD": held, "MORE": T_r > held,
        "BLOCK_C": max(32, triton.next_power_of_2(C)), "BLOCK_W": block_w, "ROWS": length,
        "num_warps": 1, "enable_fp_fusion": True, **limit,
    }  # fmt: skip
    start(
        resample_kernel, (cdiv(W, block_w), cdiv(height, length), B),
        (
            logits.contiguous(), *(table.contiguous() for table in tables), labels, mean,
            H, W, P, V, T_r, T_c,
        ),
        constants,
    )  # fmt: skip
    return labels, mean


def registers(use: str, held: int, more: bool, classes: int, itemsize: int) -> int:
    """The limit of registers of a thread on NVIDIA GPUs.

    Without a limit the assembler spills some, so that more programs fit. With these limits no
    supported version spills on any supported GPU.
    """
    few = classes <= THREAD_CLASSES
    if use == "single":
        if held <= 2:
            return 64 if classes <= 19 else 80 if few else 128
        return 232 if more else 128 if classes <= 19 else 168
    if use == "views":
        return 168 if classes <= 19 and itemsize == 2 else 232 if few else 255
    if held <= 2:
        return 112 if few else 168
    return 168 if few else 255


@taped
def confusion(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of each (target, label) pair, then of pixels without a class: int64 [C * C + 1]."""
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=labels.device)
    bins = min(MOST_BINS, triton.next_power_of_2(num_classes**2 + 2))
    blocks = cdiv(labels.numel(), CONFUSION_TILE["BLOCK"]), cdiv(num_classes**2 + 1, bins - 1)
    constants = {"C": num_classes, "BINS": bins, **CONFUSION_TILE, "enable_fp_fusion": True}
    arguments = targets.contiguous(), labels.contiguous(), counts, labels.numel()
    start(confusion_kernel, blocks, arguments, constants)
    return counts
