"""Labels that do not flicker: probabilities averaged over the frames of a video."""

import math

import torch
from torch import Tensor


class Smoothing:
    """An exponential average of the probabilities of successive frames, at low resolution.

    p = weight * p of the frame before + (1 - weight) * softmax(logits), computed as logarithms so
    that no probability becomes zero. The average continues as log(p): resizing log(p) differs from
    resizing logits by the same number for all classes, so a weight of 0 changes no label and no
    probability but for rounding.

    A call takes the logits [B, C, P] of B successive frames, as ``Predictor`` computes them, and
    returns the logits of the averages, float32 [B, C, P]. A frame with another number of
    positions, or with logits that are not finite, begins anew; the latter keep their logits.

    Args:
        weight: of the frames before, 0 up to but not 1. A change has half its effect after
            log(1/2) / log(weight) frames: 3 frames for 0.8.

    Raises:
        ValueError: ``weight`` is out of range.
    """

    def __init__(self, weight: float) -> None:
        if not 0 <= weight < 1:
            raise ValueError(f"weight must be at least 0 and less than 1, got {weight}")
        self.weight = weight
        self._average: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.stack([self._next(frame) for frame in logits])

    def _next(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if not logits.isfinite().all():
            self._average = None
            return logits
        new = logits.log_softmax(0)
        old = self._average
        if self.weight and old is not None and old.shape == new.shape:
            new = torch.logaddexp(old + math.log(self.weight), new + math.log1p(-self.weight))
        self._average = new
        return new
