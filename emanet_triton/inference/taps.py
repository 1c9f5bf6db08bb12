"""Tap tables: which logits, with which weights, make a row and a column of the full-size logits.

Every step from the network's logits to full-size logits is linear and acts on rows and columns
separately: the resize of a window, its place, the average of overlapping windows, the resize to
the single view's input, the cut of the padding, the resize to the image, and mirroring. So the
steps of an axis are composed into one table, in float64, which is rounded once.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from emanet_triton.inference.views import (
    Size,
    View,
    cover_count,
    logits_grid,
    views,
)
from emanet_triton.kernels.resample.op import Taps
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol, window_grid


@dataclass(frozen=True, eq=False)
class AxisMap:
    """A linear map along one axis: out[i] = sum over t of weight[t, i] * in[index[t, i]].

    Attributes:
        index: int64 [T, n].
        weight: float64 [T, n], not negative; every output has a weight that is not 0.
    """

    index: np.ndarray
    weight: np.ndarray

    def after(self, first: "AxisMap") -> "AxisMap":
        """The map that applies ``first``, then this one."""
        n = self.index.shape[1]
        weight = first.weight[:, self.index] * self.weight  # [T of first, T, n]
        return _merged(first.index[:, self.index].reshape(-1, n), weight.reshape(-1, n))

    def part(self, begin: int, length: int) -> "AxisMap":
        """The map to ``length`` of the outputs, from ``begin`` on."""
        kept = slice(begin, begin + length)
        return AxisMap(self.index[:, kept], self.weight[:, kept])


def resize_map(n_in: int, n_out: int, align_corners: bool) -> AxisMap:
    """One axis of ``torch.nn.functional.interpolate(mode="bilinear")``."""
    position = np.arange(n_out, dtype=np.float64)
    if align_corners:
        source = position * ((n_in - 1) / max(n_out - 1, 1))
    else:
        source = np.maximum((position + 0.5) * (n_in / n_out) - 0.5, 0)
    low = np.minimum(source.astype(np.int64), n_in - 1)
    fraction = np.minimum(source - low, 1)
    index = np.stack([low, np.minimum(low + 1, n_in - 1)])
    return _merged(index, np.stack([1 - fraction, fraction]))


def windows_map(n_low: int, spans: Sequence[tuple[int, int]], align_corners: bool) -> AxisMap:
    """The windows of an axis, each resized and put in place, averaged where they overlap.

    Args:
        n_low: logits of a window along the axis. Window k has the positions from k * n_low on.
        spans: (begin, end) of the windows, equally long.
        align_corners: the convention of the resize.
    """
    begin, end = spans[0]
    window = resize_map(n_low, end - begin, align_corners)
    length = spans[-1][1]
    count = cover_count(length, spans)
    index = np.zeros((len(spans), len(window.index), length), np.int64)
    weight = np.zeros(index.shape)
    for k, (begin, end) in enumerate(spans):
        index[k, :, begin:end] = window.index + k * n_low
        weight[k, :, begin:end] = window.weight / count[begin:end]
    return _merged(index.reshape(-1, length), weight.reshape(-1, length))


@functools.lru_cache(maxsize=16)  # a flipped view often has the maps of the plain one
def view_maps(
    protocol: Protocol, view: View, size: Size, stride: int = Network.stride
) -> tuple[AxisMap, AxisMap]:
    """Maps from the logits of a view's windows to the rows and columns of its full-size logits.

    Args:
        protocol: how the view is cut into windows, and the convention of the resizes.
        view: the network's input. The maps do not flip it back.
        size: (height, width) of the image.
        stride: of the network.
    """

    def along(axis: int, n_low: int, spans: Sequence[tuple[int, int]]) -> AxisMap:
        if protocol.direct:
            return resize_map(n_low, size[axis], protocol.align_corners)
        steps = windows_map(n_low, spans, protocol.align_corners)
        later = protocol.later_align_corners
        if view.enlarged:
            steps = resize_map(view.size[axis], view.enlarged[axis], later).after(steps)
        shown = steps.part(view.first[axis], view.shown[axis])
        return resize_map(view.shown[axis], size[axis], later).after(shown)

    _, low_height, low_width = logits_grid(protocol, view.size, stride)
    rows, columns = window_grid(protocol, view.size)
    return along(0, low_height, rows), along(1, low_width, columns)


def tap_tables(
    protocol: Protocol,
    size: Size,
    ms_flip: bool,
    device: torch.device,
    stride: int = Network.stride,
) -> tuple[Taps, Taps]:
    """The taps of an image's rows and columns, for the views of a protocol, see ``views.views``.

    Args:
        protocol: how the image is resized and cut into windows.
        size: (height, width) in pixels of the image, and so of the output.
        ms_flip: whether every scale has a mirrored view, too.
        device: where to put the tables.
        stride: of the network.
    """
    return view_tables(protocol, views(protocol, size, ms_flip), size, device, stride)


@functools.lru_cache(maxsize=8)
def view_tables(
    protocol: Protocol,
    inputs: tuple[View, ...],
    size: Size,
    device: torch.device,
    stride: int = Network.stride,
) -> tuple[Taps, Taps]:
    """The taps of an image's rows and columns, for ``kernels.resample``.

    The tables address the logits of all views in one row of memory: view after view. The windows of
    a view and the positions in a window follow row by row.

    Args:
        protocol: how the views are cut into windows, and the convention of the resizes.
        inputs: the network's inputs.
        size: (height, width) in pixels of the image, and so of the output.
        device: where to put the tables.
        stride: of the network.
    """
    rows, columns, begin = [], [], 0
    for view in inputs:
        windows, height, width = logits_grid(protocol, view.size, stride)
        windows_across = len(window_grid(protocol, view.size)[1])
        window = height * width
        plain = view._replace(flipped=(False, False))
        row, column = view_maps(protocol, plain, size, stride)
        row = _at_offsets(row, height, window * windows_across, width)
        column = _at_offsets(column, width, window, 1)
        down, across = (-1 if flipped else 1 for flipped in view.flipped)
        rows.append(AxisMap(row.index[:, ::down] + begin, row.weight[:, ::down]))
        columns.append(AxisMap(column.index[:, ::across], column.weight[:, ::across]))
        begin += window * windows
    return _packed(rows, device), _packed(columns, device)


def _at_offsets(axis: AxisMap, n_low: int, window_stride: int, stride: int) -> AxisMap:
    """The map with offsets into the logits of all views, instead of positions along the axis."""
    window, position = np.divmod(axis.index, n_low)
    return AxisMap(window * window_stride + position * stride, axis.weight)


def _merged(index: np.ndarray, weight: np.ndarray) -> AxisMap:
    """The same map with fewer taps: sorted by input, one per input, without taps of weight 0."""
    n = index.shape[1]
    heaviest = np.take_along_axis(index, weight.argmax(0)[None], 0)
    index = np.where(weight == 0, heaviest, index)
    order = index.argsort(0, kind="stable")
    index, weight = np.take_along_axis(index, order, 0), np.take_along_axis(weight, order, 0)
    tap = np.cumsum(np.diff(index, axis=0, prepend=index[:1]) != 0, axis=0)
    shape = (tap.max() + 1, n)
    merged, total = np.broadcast_to(index[:1], shape).copy(), np.zeros(shape)
    merged[tap, np.arange(n)] = index
    np.add.at(total, (tap, np.broadcast_to(np.arange(n), tap.shape)), weight)
    return AxisMap(merged, total)


def _packed(views: Sequence[AxisMap], device: torch.device) -> Taps:
    """The maps of all views in one table, with taps of weight 0 where a view has fewer."""
    taps = max(len(view.index) for view in views)
    index, weight = [], []
    for view in views:
        missing = ((0, taps - len(view.index)), (0, 0))
        index.append(np.pad(view.index, missing, "edge"))
        weight.append(np.pad(view.weight, missing))
    return Taps(
        torch.from_numpy(np.stack(index).astype(np.int32)).to(device),
        torch.from_numpy(np.stack(weight).astype(np.float32)).to(device),
    )
