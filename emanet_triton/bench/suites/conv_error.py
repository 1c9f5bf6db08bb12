"""The gate of convolutions."""

from torch import Tensor

# Of any provider, relative in norm; Winograd's in half precision is five times a plain one's.
MOST_ERROR = {"fp32": 3e-6, "bf16": 2e-2, "fp16": 2.5e-3}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
