"""``segment`` and ``Predictor`` under the path that they had before they moved."""

from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.segment import segment

__all__ = ["Predictor", "segment"]
