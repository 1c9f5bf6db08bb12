"""How a quantity grows with size: a power law, fitted by least squares of the logarithms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST_POINTS = 3  # two points lie on some line whatever they are


@dataclass(frozen=True)
class Growth:
    """``y`` grows as ``x ** exponent``.

    Attributes:
        exponent: slope of log y on log x.
        r_squared: share of log y's variance that the line explains; 1 where y never changes.
        points: how many it was fitted to.
    """

    exponent: float
    r_squared: float
    points: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f} (R² {self.r_squared:.3f}, {self.points} points)"


def fit(x: Sequence[float], y: Sequence[float]) -> Growth:
    """Fit a power law.

    Args:
        x: sizes, positive, of three different values at least.
        y: what was measured at each, positive.

    Raises:
        ValueError: fewer than three different sizes, another number of ``y``, or a value that is
            not positive and finite.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must be equally long, got {len(x)} and {len(y)}")
    if len(set(x)) < FEWEST_POINTS:
        raise ValueError(f"a fit needs at least {FEWEST_POINTS} different sizes, got {len(set(x))}")
    if not all(0 < value < math.inf for value in (*x, *y)):
        raise ValueError("all values must be positive and finite")
    a, b = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    variance = sum((p - mean_a) ** 2 for p in a)
    slope = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True)) / variance
    total = sum((q - mean_b) ** 2 for q in b)
    left = sum((q - mean_b - slope * (p - mean_a)) ** 2 for p, q in zip(a, b, strict=True))
    return Growth(slope, 1 - left / total if total else 1.0, len(x))
