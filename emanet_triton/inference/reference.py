"""mmsegmentation's sequence from images to probabilities, in plain PyTorch and at full size.

It is the specification of ``predictor``, which computes the same with tap tables. Here the logits
of every view are enlarged to the size of the network's input, and then to the size of the image.
"""

from collections.abc import Callable, Iterator, Sequence

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
        forward: the network, [n, 3, h, w] → logits [n, C, h / stride, w / stride].
        images: uint8 RGB [H, W, 3], equally large.
        protocol: how to resize, place windows and scale.
        ms_flip: average over the ratios, each plain and mirrored.
        device: where the network runs.

    Returns:
        [B, C, H, W], in the dtype of the logits, at least float32.
    """
    each = _view_probabilities(forward, images, protocol, ms_flip, torch.device(device))
    total, views = next(each), 1
    for probabilities_of_view in each:
        total.add_(probabilities_of_view)
        views += 1
    return total / views if views > 1 else total


def _view_probabilities(
    forward: Callable[[Tensor], Tensor],
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the probabilities of each view at the size of the images, mirrored back."""
    image_size = images[0].shape[:2]
    for size in view_sizes(protocol, image_size, ms_flip):
        inputs = scaled_inputs(images, size, device, forward).contiguous()
        for mirrored in (False, True) if ms_flip else (False,):
            view = inputs.flip(3) if mirrored else inputs
            found = view_logits(forward, view, image_size, protocol).softmax(1)
            yield found.flip(3) if mirrored else found


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
    """Resize bilinearly to ``size`` (height, width), in the protocol's convention."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=protocol.align_corners)
