"""mmsegmentation's sequence from images to probabilities, in plain PyTorch and at full size.

The specification of what ``inference`` computes with composed taps. Logits of the size of the
network's input and of the image exist for every view.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.inference.inputs import cut_windows, scaled_inputs
from emanet_triton.inference.views import Size, cover_count, view_sizes, window_grid
from emanet_triton.models.protocol import Protocol


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
        forward: the network, [n, 3, h, w] → logits [n, C, h / 8, w / 8].
        images: uint8 RGB [H, W, 3], equally large.
        protocol: how to resize, place windows and scale.
        ms_flip: average over the ratios, each plain and mirrored.
        device: where the network runs.

    Returns:
        [B, C, H, W], in the dtype of the logits or float32, whichever is the finer.
    """
    image_size = images[0].shape[:2]
    total, views = None, 0
    for size in view_sizes(protocol, image_size, ms_flip):
        inputs = scaled_inputs(images, size, torch.device(device)).contiguous()
        for mirrored in (False, True) if ms_flip else (False,):
            inputs_of_view = inputs.flip(3) if mirrored else inputs
            view = view_logits(forward, inputs_of_view, image_size, protocol).softmax(1)
            view = view.flip(3) if mirrored else view
            total = view if total is None else total.add_(view)
            views += 1
    return total / views if views > 1 else total


def view_logits(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, size: Size, protocol: Protocol
) -> Tensor:
    """Logits [B, C, H, W] at an image's size (height, width), from network inputs [B, 3, h, w]."""
    height, width = inputs.shape[2:]
    rows, columns = window_grid(protocol, (height, width))
    logits = forward(*cut_windows(inputs, protocol))  # [windows * B, C, ...]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.new_zeros(len(inputs), logits.shape[1], height, width)
    window = (rows[0][1] - rows[0][0], columns[0][1] - columns[0][0])
    places = [(slice(*row), slice(*column)) for row in rows for column in columns]
    for (row, column), part in zip(places, logits.split(len(inputs)), strict=True):
        total[:, :, row, column] += _resize(part, window, protocol)
    count = np.outer(cover_count(height, rows), cover_count(width, columns))
    return _resize(total.div_(torch.from_numpy(count).to(total)), size, protocol)


def _resize(logits: Tensor, size: tuple[int, int], protocol: Protocol) -> Tensor:
    """Bilinear to (height, width) in the protocol's convention."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=protocol.align_corners)
