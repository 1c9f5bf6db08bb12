"""Sliding windows as PyTorch operators, for sizes that are known only at run time.

``inference.views`` and ``inference.taps`` compute the same for sizes that are known.
"""

import torch
from torch import Tensor, nn

from emanet_triton.deploy.resize import Length, resize_matrix
from emanet_triton.models.protocol import Protocol


def slide(network: nn.Module, inputs: Tensor, protocol: Protocol) -> Tensor:
    """Logits of the inputs' size from sliding windows (mmseg ``EncoderDecoder.slide_inference``).

    To enlarge the logits of windows, to put them in place and to average them is linear along each
    axis: one matrix for the rows does it, and one for the columns.

    Args:
        network: float32 images [n, 3, h, w] → logits.
        inputs: normalised images, float32 [B, 3, H, W].
        protocol: with the size and the distance of the windows.

    Returns:
        float32 [B, C, H, W].
    """
    assert protocol.crop and protocol.stride
    batch, _, height, width = inputs.shape
    lengths = zip((height, width), protocol.crop, protocol.stride, strict=True)
    rows, columns = (_positions(*axis, inputs) for axis in lengths)
    (down, high), (across, wide) = rows.shape, columns.shape
    pixels = inputs.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    pixels = pixels.view(batch, 3, down, high, across, wide).permute(2, 4, 0, 1, 3, 5)
    logits = network(pixels.reshape(down * across * batch, 3, high, wide)).float()

    _, classes, low_high, low_wide = logits.shape
    logits = logits.view(down, across, batch, classes, low_high, low_wide)
    logits = logits.permute(2, 3, 0, 4, 1, 5)
    logits = logits.reshape(batch, classes, down * low_high, across * low_wide)
    by_rows = _averages(rows, height, low_high, protocol.align_corners)
    by_columns = _averages(columns, width, low_wide, protocol.align_corners)
    return by_rows @ logits @ by_columns.mT


def _positions(length: Length, crop: int, stride: int, like: Tensor) -> Tensor:
    """The positions of each window along one axis, int64 [windows, positions of a window].

    A program for all sizes has at least two windows, perhaps the same twice, because
    ``torch.export`` records programs for one window and for more separately.
    """
    count = torch.sym_max(length - crop + stride - 1, 0) // stride + 1
    count = count if isinstance(count, int) else torch.sym_max(count, 2)
    ends = torch.arange(count, device=like.device) * stride + crop
    ends = ends.minimum(torch.full((), length, dtype=torch.int64, device=like.device))
    begins = (ends - crop).clamp(min=0)
    return begins[:, None] + torch.arange(torch.sym_min(length, crop), device=like.device)


def _averages(positions: Tensor, length: Length, low: Length, align_corners: bool) -> Tensor:
    """The matrix [length, windows * low] from the logits of all windows of an axis to the average.

    Args:
        positions: of each window.
        length: of the axis.
        low: logits of a window along the axis.
        align_corners: the convention of the resize.
    """
    windows, window = positions.shape
    axis = torch.arange(length, device=positions.device)
    covers = (axis[:, None, None] == positions).float()  # [length, windows, window]
    covers = covers / covers.sum((1, 2), keepdim=True)
    enlarge = resize_matrix(low, window, align_corners, positions)
    return (covers @ enlarge).view(length, windows * low)
