"""Labels, probabilities and confusion matrices from low-resolution logits, in plain PyTorch.

Works in strips of rows, so that memory does not grow with the image beyond what is returned. A
strip is cut into tiles of columns; a tile's logits are a product of two small matrices and the few
low-resolution logits that it taps. On a CPU each thread takes whole strips.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from emanet_triton.kernels.threads import for_each

STRIP_BYTES = 2**20  # of the scores of a strip; the same for any number of threads, as its bits are
MIN_ROWS = 8  # of a strip, since fewer would share too little work
TILE = 128  # columns
CHUNK = 2**18  # pixels counted at once, as eight bytes each
IGNORE = 255  # a target that is not counted


def resample(
    logits: Tensor, tables: Sequence[Tensor], *, probabilities: bool
) -> tuple[Tensor, Tensor | None]:
    """Labels, uint8 [B, H, W], and if asked for mean probabilities, float32 [B, C, H, W].

    Args:
        logits: [B, C, P].
        tables: index and weight of the rows, then of the columns.
        probabilities: whether to return them, too.
    """
    (B, C, _), (V, _, H), W = logits.shape, tables[0].shape, tables[2].shape[2]
    labels = torch.empty((B, H, W), dtype=torch.uint8, device=logits.device)
    mean = None
    if probabilities:
        mean = torch.empty((B, C, H, W), dtype=torch.float32, device=logits.device)
    # A float32 product on a GPU may be rounded to TF32.
    dtype = torch.float64 if logits.is_cuda else torch.float32
    size = min(max(STRIP_BYTES // (4 * C * W), MIN_ROWS), H)
    rows = [_matrices(*view, size, dtype) for view in zip(*tables[:2], strict=True)]
    columns = [_matrices(*view, TILE, dtype) for view in zip(*tables[2:], strict=True)]

    def make_run() -> Callable[[tuple[int, int]], None]:
        # A thread's own, [tiles, rows, C, TILE]. What it would allocate anew for every view of
        # every strip, the C library would pile up.
        shape = -(-W // TILE), size, C, TILE
        scores, total = torch.empty((2, *shape), dtype=dtype, device=logits.device)

        def run(strip: tuple[int, int]) -> None:
            b, i = strip
            begin, end = i * size, min((i + 1) * size, H)
            for v, ((row_used, row_matrix), column) in enumerate(zip(rows, columns, strict=True)):
                view = scores if v else total
                _logits(logits[b], row_used[i], row_matrix[i], *column, out=view)
                if probabilities or V > 1:
                    torch.softmax(view, 2, out=view)
                if v:
                    total.add_(view)
            summed = total[:, : end - begin]
            labels[b, begin:end] = _side_by_side(_first_maximum(summed), W)
            if probabilities:
                mean[b, :, begin:end] = _side_by_side(summed.permute(2, 0, 1, 3) / V, W)

        return run

    strips = [(b, i) for b in range(B) for i in range(-(-H // size))]
    with torch.autocast(logits.device.type, enabled=False):  # which would round the products
        for_each(make_run, strips, logits.device)
    return labels, mean


def confusion(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of each (target, label) pair, int64 [C * C + 1]; the last of what is no class."""
    values = IGNORE + 1  # of uint8
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
    """One view's taps [T, n], ``size`` outputs at a time.

    Returns:
        Offsets that are used, [runs, k], and their weights, [runs, size, k], filled up with 0.
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
    """Logits of a strip, ``out`` [tiles, rows, C, TILE], from those of one image, [C, P]."""
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
