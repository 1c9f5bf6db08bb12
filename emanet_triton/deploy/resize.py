"""The resizes of an evaluation as PyTorch operators, for sizes that are known only at run time.

A size is an int, or a ``torch.SymInt`` while ``torch.export`` records a program. So no function
here makes a decision by the value of a size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.inference.views import rescaled
from emanet_triton.models.protocol import Protocol

Length = Any  # an int or a torch.SymInt
Lengths = tuple[Length, Length]  # (height, width) in pixels

_ONE = 2048  # OpenCV's weights are multiples of 1 / 2048


def fitted(size: Lengths, target: tuple[int, int]) -> Lengths:
    """The largest size with the ratio of ``size`` that fits ``target``.

    A known size is fitted by ``inference.views.rescaled``, any other by ``exactly_fitted``.
    """
    if isinstance(size[0], int) and isinstance(size[1], int):
        return rescaled(size, target)
    return exactly_fitted(size, target)


def exactly_fitted(size: Lengths, target: tuple[int, int]) -> Lengths:
    """``rescaled`` without its rounding errors.

    ``rescaled`` rounds a product in floating point, this function an exact fraction. They differ if
    the fraction is a half that the product misses (2000x3000 pixels that are to fit 1025x2049), and
    maybe if a side is longer than 6143 pixels.
    """
    longer, shorter = torch.sym_max(*size), torch.sym_min(*size)

    def along(side: Length) -> Length:
        by_longer = (2 * side * max(target) + longer) // (2 * longer)
        by_shorter = (2 * side * min(target) + shorter) // (2 * shorter)
        return torch.sym_max(torch.sym_min(by_longer, by_shorter), 1)

    return along(size[0]), along(size[1])


def resize_images(images: Tensor, size: Lengths) -> Tensor:
    """Resize uint8 images [B, H, W, 3] as OpenCV does (``cv2.resize``, ``INTER_LINEAR``).

    OpenCV computes in fixed point: ``HResizeLinear`` and ``VResizeLinear`` of its ``resize.cpp``.
    The result is equal to its result.

    Args:
        images: uint8 [B, H, W, 3].
        size: (height, width) of the result.

    Returns:
        uint8 [B, height, width, 3].
    """
    _, height, width, _ = images.shape
    left, right, weights = _taps(width, size[1], images.device)
    inside = (left >= 0) & (left < width - 1)  # beyond the first and last pixel one tap has all
    first = torch.where(inside, weights[0], _ONE)[:, None]
    second = torch.where(inside, weights[1], 0)[:, None]
    x = images.int()
    left, right = _within(left, width), _within(right, width)
    x = (x.index_select(2, left) * first + x.index_select(2, right) * second) >> 4

    above, below, weights = _taps(height, size[0], images.device)
    first, second = (weight[:, None, None] for weight in weights)
    above, below = _within(above, height), _within(below, height)
    upper = (x.index_select(1, above) * first) >> 16
    lower = (x.index_select(1, below) * second) >> 16
    return ((upper + lower + 2) >> 2).to(torch.uint8)


def pad_inputs(inputs: Tensor, protocol: Protocol) -> Tensor:
    """Inputs [B, 3, H, W], padded with 0 at the bottom and at the right as the protocol says."""
    for axis, side in enumerate(inputs.shape[2:]):
        step = protocol.pad_step or 1
        wanted = torch.sym_max(side, protocol.pad_size[axis] if protocol.pad_size else 1)
        wanted = (wanted + step - 2) // step * step + 1
        places = torch.arange(wanted, device=inputs.device)
        inputs = inputs.index_select(2 + axis, _within(places, side))
        inside = places < torch.full((), side, dtype=torch.int64, device=inputs.device)
        inputs = inputs * (inside if axis else inside[:, None]).to(inputs.dtype)
    return inputs


def resize_logits(logits: Tensor, size: Lengths, align_corners: bool) -> Tensor:
    """Resize logits [B, C, h, w] bilinearly to (height, width)."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def resize_matrix(n_in: Length, n_out: Length, align_corners: bool, like: Tensor) -> Tensor:
    """One axis of ``resize_logits`` as a matrix, float32 [n_out, n_in], on the device of ``like``.

    An output takes from an input the more, the nearer they are.
    """
    places = torch.arange(n_out, dtype=torch.float64, device=like.device)
    inputs = torch.arange(n_in, dtype=torch.float64, device=like.device)
    if align_corners:
        source = places * (_number(n_in - 1, like) / _number(n_out - 1, like).clamp(min=1))
    else:
        source = _centres(places, n_in, n_out)
    source = source.clamp(min=0).minimum(_number(n_in - 1, like))
    return (1 - (source[:, None] - inputs).abs()).clamp(min=0).float()


def _taps(n_in: Length, n_out: Length, device: torch.device) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The two neighbours of each output of one axis, perhaps outside, and their weights."""
    places = torch.arange(n_out, dtype=torch.float64, device=device)
    source = _centres(places, n_in, n_out).float()  # OpenCV rounds here
    low = source.floor()
    share = source - low
    weights = [(part * _ONE).round().int() for part in (1 - share, share)]
    low = low.long()
    return low, low + 1, weights


def _centres(places: Tensor, n_in: Length, n_out: Length) -> Tensor:
    """Where the centres of outputs lie among the inputs: (p + 1/2) n_in / n_out - 1/2 for place p.

    A runtime may compute in float32, as OpenVINO does. So the position is the sum of whole numbers,
    exact in float32 if ``n_out`` is at most 2048, and of a fraction.
    """
    inputs, outputs = _number(n_in, places), _number(n_out, places)
    step = (inputs / outputs).floor()
    rest = (2 * places + 1) * (inputs - step * outputs) + (step - 1) * outputs
    low = (rest / (2 * outputs)).floor()
    return places * step + low + (rest - 2 * low * outputs) / (2 * outputs)


def _within(index: Tensor, length: Length) -> Tensor:
    last = torch.full((), length - 1, dtype=torch.int64, device=index.device)
    return index.clamp(min=0).minimum(last)


def _number(value: Length, like: Tensor) -> Tensor:
    """A size as a float64 tensor: a program divides tensors, not sizes."""
    return torch.full((), value, dtype=torch.float64, device=like.device)
