"""The sequence from images to probabilities, in plain PyTorch and at full size.

It is the specification of ``predictor``, which computes the same with tap tables. Here the logits
of every view are enlarged to the size of the network's input, and then to the size of the image.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.inference.inputs import cut_windows, scaled_inputs
from emanet_triton.inference.views import Size, View, cover_count, views
from emanet_triton.models.protocol import Protocol, window_grid


def probabilities(
    forward: Callable[[Tensor], Tensor],
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool = False,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class probabilities of images (mmseg ``EncoderDecoder.simple_test`` and ``aug_test``).

    Args:
        forward: the network, [n, 3, h, w] → logits [n, C, h / stride, w / stride].
        images: uint8 RGB [H, W, 3], equally large.
        protocol: how to resize, place windows and scale.
        ms_flip: average over the ratios, each plain and mirrored.
        device: where the network runs.

    Returns:
        [B, C, H, W], in the dtype of the logits, at least float32.
    """
    each = _view_scores(forward, images, protocol, ms_flip, torch.device(device))
    total, views = next(each), 1
    for scores in each:
        total.add_(scores)
        views += 1
    mean = total / views if views > 1 else total
    return mean.softmax(1) if protocol.average == "logits" else mean


def _view_scores(
    forward: Callable[[Tensor], Tensor],
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield what is averaged of each view, at the size of the images, mirrored back."""
    size = images[0].shape[:2]
    each = iter(views(protocol, size, ms_flip))
    for inputs in scaled_inputs(images, protocol, ms_flip, device, forward):
        plain = inputs.contiguous()
        for mirrored in (False, True) if ms_flip else (False,):
            view = plain.flip(3) if mirrored else plain
            scores = view_logits(forward, view, size, protocol, next(each))
            if protocol.average == "probabilities":
                scores = scores.softmax(1)
            yield scores.flip(3) if mirrored else scores


def view_logits(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    size: Size,
    protocol: Protocol,
    view: View | None = None,
) -> Tensor:
    """Logits at an image's size, not mirrored back.

    Args:
        forward: the network.
        inputs: [B, 3, h, w].
        size: (height, width) of the image.
        protocol: how to place windows, and the convention of the resizes.
        view: which part of the inputs shows the image; by default the whole inputs.

    Returns:
        [B, C, height, width].
    """
    if protocol.direct:
        return _resize(forward(inputs), size, protocol.align_corners)
    logits = input_logits(forward, inputs, protocol)
    if view:
        if view.enlarged:
            logits = _resize(logits, view.enlarged, protocol.later_align_corners)
        (top, left), (height, width) = view.first, view.shown
        logits = logits[:, :, top : top + height, left : left + width]
    return _resize(logits, size, protocol.later_align_corners)


def input_logits(forward: Callable[[Tensor], Tensor], inputs: Tensor, protocol: Protocol) -> Tensor:
    """Logits [B, C, h, w] at the size of network inputs [B, 3, h, w]."""
    height, width = inputs.shape[2:]
    rows, columns = window_grid(protocol, (height, width))
    logits = forward(*cut_windows(inputs, protocol))  # [windows * B, C, ...]
    total = inputs.new_zeros(
        (len(inputs), logits.shape[1], height, width),
        dtype=torch.promote_types(logits.dtype, torch.float32),
    )
    window = (rows[0][1] - rows[0][0], columns[0][1] - columns[0][0])
    places = [(slice(*row), slice(*column)) for row in rows for column in columns]
    for (row, column), part in zip(places, logits.split(len(inputs)), strict=True):
        total[:, :, row, column] += _resize(part, window, protocol.align_corners)
    count = np.outer(cover_count(height, rows), cover_count(width, columns))
    return total.div_(torch.from_numpy(count).to(total))


def _resize(logits: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resize bilinearly to ``size`` (height, width), in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
