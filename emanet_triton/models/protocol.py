"""How an image is brought to the network and its logits back to labels."""

from dataclasses import dataclass
from typing import Literal

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
VERSIONS = ("mmseg-0.x", "mmseg-1.x")


@dataclass(frozen=True)
class Protocol:
    """The evaluation protocol of a checkpoint (mmsegmentation ``test_cfg`` and test pipeline).

    Attributes:
        base_scale: (width, height) in pixels that every image is resized into, keeping its ratio.
        mode: ``"whole"`` runs the network once on the resized image, ``"slide"`` on windows of it.
        crop: (height, width) of a window in pixels; ``None`` in whole mode.
        stride: (rows, columns) in pixels between windows; ``None`` in whole mode.
        align_corners: the convention of every resize of logits.
        ratios: scales of the multi-scale evaluation, each also mirrored.
        version: ``"mmseg-0.x"`` (default) multiplies ``base_scale`` by a ratio, ``"mmseg-1.x"``
            the image's own size. They differ only in ms+flip.

    Raises:
        ValueError: an unknown mode or version, a slide protocol without crop and stride,
            or a size or ratio that is not positive.
    """

    base_scale: tuple[int, int]
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
        sizes = (*self.base_scale, *(self.crop or ()), *(self.stride or ()), *self.ratios)
        if not self.ratios or min(sizes) <= 0:
            raise ValueError(f"sizes and ratios must be positive, got {self}")
        if windowed and any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise ValueError(f"stride {self.stride} leaves gaps between windows of {self.crop}")
