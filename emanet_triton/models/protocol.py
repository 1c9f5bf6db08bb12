"""How an image becomes inputs and windows of the network, and how logits become labels."""

import operator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
MMSEG_VERSIONS = ("mmseg-0.x", "mmseg-1.x")
VERSIONS = (*MMSEG_VERSIONS, "sssegmentation", "official", "paddleseg")
AVERAGES = ("probabilities", "logits")
MOST_INPUTS = 64  # of the network at once on a GPU by default: enough for all windows of an image
LARGEST = 2**16  # pixels of a side
LARGEST_RATIO = 16
SCALINGS = ("image", "input", "rounded", "previous")


@dataclass(frozen=True)
class Protocol:
    """The evaluation protocol of a checkpoint, by default as in mmsegmentation.

    An image is resized, normalised and padded: this is the input of a single view. The network's
    logits are resized to its input's size, the padding is cut off, and the rest is resized to the
    image's size. Multi-scale evaluation (ms+flip) averages over several scales, each also mirrored;
    a mirrored view mirrors the padded input.

    Attributes:
        base_scale: (width, height) in pixels, in mmsegmentation's order. An image is resized to
            the largest size that fits into it and has the image's ratio. ``None``: an image
            keeps its own size, which ms+flip multiplies by the ratios.
        mode: ``"whole"`` runs the network once, on the resized image. ``"slide"`` runs it on
            windows of the resized image and averages their logits where they overlap.
        crop: (height, width) of a window in pixels; ``None`` in whole mode.
        stride: distance between windows in pixels, (down, across); ``None`` in whole mode.
        align_corners: as in ``torch.nn.functional.interpolate``, for every resize of logits.
        ratios: scales of the multi-scale evaluation (ms+flip), each also mirrored.
        version: the project that evaluates so, for reports. ``"mmseg-1.x"`` also says what ms+flip
            multiplies by a ratio: the size of the image, and not ``base_scale``.
        direct: resize logits once, from the network's own size to the image's (sssegmentation,
            ``Tester.start``). Whole mode only, without padding.
        average: what ms+flip averages over the views: ``"probabilities"``, or ``"logits"``
            (sssegmentation, ``Tester.start``; PaddleSeg, ``aug_inference`` of
            ``paddleseg/core/infer.py``).
        scaling: what ms+flip resizes. ``"image"``: the image, by OpenCV. ``"input"``: the input of
            the single view, bilinearly by a factor (sssegmentation, ``Tester.auginference``).
            ``"rounded"``: the same input to its size times a ratio, rounded, with
            ``align_corners=False`` (PaddleSeg from 2.8, ``aug_inference``). ``"previous"``: the
            input of the ratio before, to the same sizes (PaddleSeg before 2.8). The last three
            resize logits to the single view's input before its padding is cut off.
        pad_size: (height, width): the normalised input is padded with 0 at the bottom and at the
            right to at least this size (PaddleSeg on Pascal VOC).
        pad_step: the sides of the normalised input are padded likewise, each to the next
            ``k * pad_step + 1`` (the official EMANet: 8).
        final_align_corners: ``align_corners`` of the resizes of logits that follow the one to the
            network's input; ``None``: like ``align_corners`` (PaddleSeg: false).

    Raises:
        ValueError: a mode, version, average or scaling is unknown; crop and stride do not belong
            to the mode; a stride is larger than the crop; a size is not 1 to 65536, or a ratio not
            above 0 and at most 16; or ``direct`` has windows, padding or ``final_align_corners``.
    """

    base_scale: tuple[int, int] | None
    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    align_corners: bool = False
    ratios: tuple[float, ...] = RATIOS
    version: Literal["mmseg-0.x", "mmseg-1.x", "sssegmentation", "official", "paddleseg"] = (
        "mmseg-0.x"
    )
    direct: bool = False
    average: Literal["probabilities", "logits"] = "probabilities"
    scaling: Literal["image", "input", "rounded", "previous"] = "image"
    pad_size: tuple[int, int] | None = None
    pad_step: int | None = None
    final_align_corners: bool | None = None

    @property
    def padded(self) -> bool:
        """Whether inputs are padded."""
        return self.pad_size is not None or self.pad_step is not None

    @property
    def later_align_corners(self) -> bool:
        """``align_corners`` of the resizes of logits that follow the one to the input's size."""
        given = self.final_align_corners
        return self.align_corners if given is None else given

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            raise ValueError(f"mode must be 'whole' or 'slide', got {self.mode!r}")
        for name, known in (("version", VERSIONS), ("average", AVERAGES), ("scaling", SCALINGS)):
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {got!r}")
        windowed = self.crop is not None and self.stride is not None
        if self.mode == "slide" and not windowed:
            raise ValueError("mode 'slide' needs crop and stride")
        if self.mode == "whole" and (self.crop is not None or self.stride is not None):
            raise ValueError("mode 'whole' takes no crop and no stride")
        pairs = (self.base_scale, self.crop, self.stride, self.pad_size)
        sizes = (*chain(*filter(None, pairs)), *(() if self.pad_step is None else (self.pad_step,)))
        if not all(0 < size <= LARGEST for size in sizes):
            raise ValueError(f"sizes must be 1 to {LARGEST} pixels, got {self}")
        if not self.ratios or not all(0 < ratio <= LARGEST_RATIO for ratio in self.ratios):
            raise ValueError(f"ratios must be above 0 and at most {LARGEST_RATIO}, got {self}")
        if self.crop and self.stride and any(map(operator.gt, self.stride, self.crop)):
            raise ValueError(f"stride {self.stride} leaves gaps between windows of {self.crop}")
        later = self.final_align_corners is not None
        if self.direct and (self.mode == "slide" or self.padded or later):
            raise ValueError(
                "direct resizes logits once: it takes no windows, no padding and no "
                "final_align_corners"
            )


def windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Sliding windows along one axis (mmseg ``EncoderDecoder.slide_inference``).

    The last window is moved back so that it ends at the border; an axis shorter than ``crop``
    gets one shorter window.

    Args:
        length: of the axis in pixels.
        crop: length of a window in pixels.
        stride: pixels from the beginning of a window to the next, at most ``crop``.

    Returns:
        (begin, end) of each window, in order.
    """
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def window_grid(
    protocol: Protocol, size: tuple[int, int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The windows of a network input: (begin, end) along its rows, then along its columns.

    Whole mode has one window, the input. ``size`` is (height, width) in pixels.
    """
    height, width = size
    if protocol.crop is None or protocol.stride is None:
        return [(0, height)], [(0, width)]
    (crop_h, crop_w), (stride_h, stride_w) = protocol.crop, protocol.stride
    return windows(height, crop_h, stride_h), windows(width, crop_w, stride_w)


def num_windows(protocol: Protocol, size: tuple[int, int]) -> int:
    """How many windows a network input of (height, width) has."""
    rows, columns = window_grid(protocol, size)
    return len(rows) * len(columns)
