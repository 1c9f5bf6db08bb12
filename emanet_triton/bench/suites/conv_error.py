"""The gate of convolutions."""

from collections.abc import Mapping

from torch import Tensor

# Of any provider, relative in norm; Winograd's in half precision is five times a plain one's.
MOST_ERROR = {"fp32": 3e-6, "bf16": 2e-2, "fp16": 2.5e-3}
MOST_ERROR_TF32X3 = 3e-5  # a product in TF32 makes about 5e-4


def bound(dtype: str, provider: str, _: Mapping[str, float]) -> float:
    """The largest error of a provider that passes, as ``Case.bound``."""
    return MOST_ERROR_TF32X3 if provider == "triton-tf32x3" else MOST_ERROR[dtype]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
