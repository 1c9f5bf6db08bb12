"""How an image becomes inputs of the network, and how logits become labels."""

import operator
from dataclasses import dataclass
from typing import Literal

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
VERSIONS = ("mmseg-0.x", "mmseg-1.x")


@dataclass(frozen=True)
class Protocol:
    """The evaluation protocol of a checkpoint (mmsegmentation ``test_cfg`` and test pipeline).

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
        version: what ms+flip multiplies by a ratio. ``"mmseg-0.x"`` (default): ``base_scale``.
            ``"mmseg-1.x"``: the size of the image.

    Raises:
        ValueError: the mode or version is unknown, crop and stride do not belong to the mode,
            a stride is larger than the crop, or a size or ratio is not positive.
    """

    base_scale: tuple[int, int] | None
    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    align_corners: bool = False
    ratios: tuple[float, ...] = RATIOS
    version: Literal["mmseg-0.x", "mmseg-1.x"] = "mmseg-0.x"

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            raise ValueError(f"mode must be 'whole' or 'slide', got {self.mode!r}")
        if self.version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {self.version!r}")
        windowed = self.crop is not None and self.stride is not None
        if self.mode == "slide" and not windowed:
            raise ValueError("mode 'slide' needs crop and stride")
        if self.mode == "whole" and (self.crop is not None or self.stride is not None):
            raise ValueError("mode 'whole' takes no crop and no stride")
        sizes = (*(self.base_scale or ()), *(self.crop or ()), *(self.stride or ()), *self.ratios)
        if not self.ratios or min(sizes) <= 0:
            raise ValueError(f"sizes and ratios must be positive, got {self}")
        if self.crop and self.stride and any(map(operator.gt, self.stride, self.crop)):
            raise ValueError(f"stride {self.stride} leaves gaps between windows of {self.crop}")
