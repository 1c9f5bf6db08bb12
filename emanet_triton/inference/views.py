"""The size of an image in each view, and of its logits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from emanet_triton.models.network import Network, logits_size
from emanet_triton.models.protocol import Protocol, num_windows, window_grid

Size = tuple[int, int]  # (height, width) in pixels, throughout the package


def rescaled(size: Size, target: Size) -> Size:
    """The largest size with the ratio of ``size`` that fits ``target`` (mmcv ``rescale_size``).

    Args:
        size: (height, width) in pixels.
        target: (height, width) in pixels. Its longer side bounds the longer side of the result,
            its shorter side the shorter.

    Returns:
        (height, width) in pixels, rounded half up, each at least 1.
    """
    factor = min(max(target) / max(size), min(target) / min(size))
    height, width = (max(int(side * factor + 0.5), 1) for side in size)
    return height, width


class Scale(NamedTuple):
    """The sizes of an image on its way to a network input, each (height, width) in pixels.

    Attributes:
        resized: of the image that OpenCV makes, and that is normalised.
        padded: after zeros were added at the bottom and at the right.
        size: of the network's input, to which the padded one is scaled.
    """

    resized: Size
    padded: Size
    size: Size


class View(NamedTuple):
    """A network input that shows an image.

    Attributes:
        size: (height, width) of the input in pixels.
        shown: (height, width) of its part that shows the image; the rest is padding.
        flipped: whether the image is flipped along (height, width).
        first: (row, column) at which this part begins.
        enlarged: (height, width) to which the input's logits are resized before the padding is cut
            off. ``shown`` and ``first`` are in its pixels. ``None``: the input's own size.
    """

    size: Size
    shown: Size
    flipped: tuple[bool, bool] = (False, False)
    first: tuple[int, int] = (0, 0)
    enlarged: Size | None = None


def scales(protocol: Protocol, size: Size, ms_flip: bool) -> list[Scale]:
    """How an image becomes each network input, in the order of ``protocol.ratios``.

    Args:
        protocol: base scale, ratios, version, scaling and padding.
        size: (height, width) of the image in pixels.
        ms_flip: whether all ratios are used, instead of the base scale alone.
    """
    if protocol.scaling == "image":
        resized = _resized_sizes(protocol, size, ms_flip)
        padded = [_padded(protocol, each) for each in resized]
        return list(map(Scale, resized, padded, padded))
    (single,) = _resized_sizes(protocol, size, ms_flip=False)
    padded_single = _padded(protocol, single)
    half = 0.0 if protocol.scaling == "input" else 0.5
    ratios = protocol.ratios if ms_flip else (1.0,)
    height, width = padded_single
    inputs = [(max(int(height * r + half), 1), max(int(width * r + half), 1)) for r in ratios]
    return [Scale(single, padded_single, each) for each in inputs]


def view_sizes(protocol: Protocol, size: Size, ms_flip: bool) -> list[Size]:
    """(height, width) of the network's inputs in pixels; arguments as in ``scales``."""
    return [scale.size for scale in scales(protocol, size, ms_flip)]


def views(protocol: Protocol, size: Size, ms_flip: bool) -> tuple[View, ...]:
    """The network's inputs: of each scale the plain one, with ``ms_flip`` then the mirrored one.

    Arguments as in ``scales``.
    """
    found = []
    for (height, width), padded, input_size in scales(protocol, size, ms_flip):
        enlarged = padded if padded != input_size else None
        for mirrored in (False, True) if ms_flip else (False,):
            # The padded input is mirrored: its padding is at the left.
            first = (0, padded[1] - width if mirrored else 0)
            found.append(View(input_size, (height, width), (False, mirrored), first, enlarged))
    return tuple(found)


def _resized_sizes(protocol: Protocol, size: Size, ms_flip: bool) -> list[Size]:
    """(height, width) to which OpenCV resizes an image."""
    width, height = protocol.base_scale or size[::-1]
    if not ms_flip:
        return [rescaled(size, (height, width))]
    if protocol.version == "mmseg-1.x":
        targets = [[int(side * ratio + 0.5) for side in size] for ratio in protocol.ratios]
    else:
        targets = [[int(side * ratio) for side in (height, width)] for ratio in protocol.ratios]
    return [rescaled(size, (max(height, 1), max(width, 1))) for height, width in targets]


def _padded(protocol: Protocol, size: Size) -> Size:
    """(height, width) of an input of ``size`` with its padding."""
    height, width = map(max, size, protocol.pad_size or (1, 1))
    step = protocol.pad_step or 1
    return height + -(height - 1) % step, width + -(width - 1) % step


def logits_grid(
    protocol: Protocol, size: Size, stride: int = Network.stride
) -> tuple[int, int, int]:
    """(windows, height, width) of the logits of a network input of (height, width) pixels.

    ``stride`` is the network's.
    """
    (row, *_), (column, *_) = window_grid(protocol, size)
    low = logits_size(row[1] - row[0], column[1] - column[0], stride)
    return num_windows(protocol, size), *low


def cover_count(length: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many windows cover each position of an axis, int64 [length]."""
    count = np.zeros(length, np.int64)
    for begin, end in spans:
        count[begin:end] += 1
    return count
