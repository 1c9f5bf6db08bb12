"""Labels, probabilities and confusion matrices from low-resolution logits, in plain PyTorch.

``resample`` works in strips of rows, so that only the results grow with the image. A strip is cut
into tiles of columns; a tile's logits are the product of two small matrices and the few
low-resolution logits that the tile needs. On a CPU each thread takes whole strips.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from emanet_triton.kernels.softmax import softmax_without_subnormals
from emanet_triton.kernels.threads import for_each

STRIP_BYTES = 2**20  # scores of a strip; fixed, so that results do not depend on the thread count
MIN_ROWS = 8  # rows of a strip: thinner strips would repeat too much work of their neighbours
TILE = 128  # columns of a tile
CHUNK = 2**18  # pixels counted at once; each takes eight bytes
IGNORE = 255  # a target that is not counted


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
    (B, C, _), (V, _, H), W = logits.shape, tables[0].shape, tables[2].shape[2]
    labels = torch.empty((B, H, W), dtype=torch.uint8, device=logits.device)
    mean = None
    if probabilities:
        mean = torch.empty((B, C, H, W), dtype=torch.float32, device=logits.device)
    # float64, since a float32 product on a GPU may be rounded to TF32.
    dtype = torch.float64 if logits.is_cuda else torch.float32
    size = min(max(STRIP_BYTES // (4 * C * W), MIN_ROWS), H)
    row_taps, column_taps = (zip(*tables[i : i + 2], strict=True) for i in (0, 2))
    rows = [_matrices(index, weight, size, dtype) for index, weight in row_taps]
    columns = [_matrices(index, weight, TILE, dtype) for index, weight in column_taps]

    def make_run() -> Callable[[tuple[int, int]], None]:
        # A thread's memory, [tiles, rows, C, TILE]. If every view of every strip allocated it anew,
        # the C library would pile it up.
        shape = -(-W // TILE), size, C, TILE
        scores, total = torch.empty((2, *shape), dtype=dtype, device=logits.device)

        def run(strip: tuple[int, int]) -> None:
            b, i = strip
            begin, end = i * size, min((i + 1) * size, H)
            for v, ((row_used, row_matrix), column) in enumerate(zip(rows, columns, strict=True)):
                view = scores if v else total
                _logits(logits[b], row_used[i], row_matrix[i], *column, out=view)
                if average == "probabilities" and (probabilities or V > 1):
                    softmax_without_subnormals(view, 2, out=view, divisor=V)
                if v:
                    total.add_(view)
            kept = slice(end - begin)
            labels[b, begin:end] = _side_by_side(_first_maximum(total[:, kept]), W)
            if mean is not None:
                total.div_(V)
                if average == "logits":
                    softmax_without_subnormals(total, 2, out=total)
                mean[b, :, begin:end] = _side_by_side(total[:, kept].permute(2, 0, 1, 3), W)

        return run

    strips = [(b, i) for b in range(B) for i in range(-(-H // size))]
    with torch.autocast(logits.device.type, enabled=False):  # autocast would round the products
        for_each(make_run, strips, logits.device)
    return labels, mean


def confusion(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of each (target, label) pair, then of pixels without a class: int64 [C * C + 1]."""
    values = IGNORE + 1  # a uint8 has so many values
    counts = torch.zeros(values**2, dtype=torch.int64, device=labels.device)
    chunks = (tensor.flatten().split(CHUNK) for tensor in (targets, labels))
    for target, label in zip(*chunks, strict=True):
        counts += torch.bincount(target.long().mul_(values).add_(label), minlength=values**2)
    scored = counts.view(values, values)[:IGNORE]
    matrix = scored[:num_classes, :num_classes]
    return torch.cat([matrix.flatten(), (scored.sum() - matrix.sum())[None]])


def _matrices(
    index: Tensor, weight: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Turn one view's taps [T, n] into a matrix for every run of ``size`` outputs.

    Returns:
        The offsets that a run uses, [runs, k], and the matrices, [runs, size, k], padded with 0.
    """
    used, matrices = [], []
    for i, w in zip(index.split(size, 1), weight.split(size, 1), strict=True):
        offsets, row = i.unique(return_inverse=True)
        matrix = torch.zeros(len(offsets), size, dtype=dtype, device=index.device)
        column = torch.arange(i.shape[1], device=index.device).expand_as(i)
        matrices.append(matrix.index_put_((row, column), w.to(dtype), accumulate=True))
        used.append(offsets)
    return pad_sequence(used, True), pad_sequence(matrices, True).mT


def _logits(
    image: Tensor,
    row_used: Tensor,
    row_matrix: Tensor,
    column_used: Tensor,
    column_matrix: Tensor,
    out: Tensor,
) -> None:
    """Compute logits of a strip, ``out`` [tiles, rows, C, TILE], from ``image`` [C, P]."""
    positions = column_used[:, None, :] + row_used[:, None]  # [tiles, k rows, k columns]
    low = image.index_select(1, positions.flatten()).to(row_matrix.dtype)
    low = low.unflatten(1, positions.shape).permute(1, 2, 0, 3)  # [tiles, k rows, C, k columns]
    wide = low.flatten(1, 2) @ column_matrix.mT  # [tiles, k rows * C, TILE]
    wide = wide.view(len(out), len(row_used), -1)
    torch.bmm(row_matrix.expand(len(out), -1, -1), wide, out=out.flatten(2))


def _first_maximum(scores: Tensor) -> Tensor:
    """The first class with the largest score, [tiles, rows, TILE]."""
    if scores.is_cuda:
        return scores.argmax(2)
    # Pooling over the classes: on a CPU many times faster than argmax, which is not vectorised.
    pixels_last = scores.flatten(0, 1).unsqueeze(2).permute(0, 3, 1, 2)  # [.., TILE, C, 1]
    _, labels = F.max_pool2d(pixels_last, (scores.shape[2], 1), return_indices=True)
    return labels[:, :, 0, 0].unflatten(0, scores.shape[:2])


def _side_by_side(tiles: Tensor, width: int) -> Tensor:
    """[..., tiles, rows, TILE] → [..., rows, width]."""
    return tiles.transpose(-3, -2).flatten(-2)[..., :width]
