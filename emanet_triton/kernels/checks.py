"""Checks of the operators' arguments: a ValueError names the expected and the given value."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from emanet_triton.kernels.device import DTYPE_NAMES

BACKENDS = ("auto", "triton", "torch")
# Backends that choose another one. "fastest" also measures the kernels in Gluon, which no GPU has
# run; "fastest-known" takes them where "fastest" has chosen them earlier, and else is "auto".
OPEN_BACKENDS = ("auto", "fastest", "fastest-known")
# Bytes: of a pointer that Triton calls aligned; of addresses and strides that a descriptor takes.
ALIGNMENT = 16


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether a GPU's tensor descriptor takes a tensor whose last axis is contiguous."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    is_aligned = all(step % ALIGNMENT == 0 for step in (tensor.data_ptr(), *steps))
    return is_aligned and all(steps) and tensor.stride(-1) == 1


def fitted(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if no descriptor takes it.

    PyTorch may give an axis of length 1 any stride, and a view any address. A descriptor takes the
    copy if its rows have whole 16 bytes.
    """
    if fits_descriptor(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_layout(name: str, tensor: Tensor, layout: str) -> None:
    """``layout`` names the axes. The first axis is B, and only B may have the length 0."""
    if tensor.dim() != len(layout.split(", ")) or 0 in tensor.shape[1:]:
        shape = list(tensor.shape)
        raise ValueError(f"{name} must be [{layout}], only B may be 0, got {shape}")


def check_shape(name: str, tensor: Tensor, wanted: Sequence[int]) -> None:
    if list(tensor.shape) != list(wanted):
        raise ValueError(f"{name} must be {list(wanted)}, got {list(tensor.shape)}")


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_dtype(
    name: str, dtype: torch.dtype, allowed: Collection[torch.dtype], like: str = ""
) -> None:
    """``like`` names the argument that decides which dtypes are allowed."""
    if dtype not in allowed:
        wanted = " or ".join(sorted({str(one) for one in allowed}))
        raise ValueError(f"{name} must be {wanted}{like and f' like {like}'}, got {dtype}")


def check_device(name: str, tensor: Tensor, like: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {like}, got {tensor.device}")


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_shift(name: str, value: object) -> None:
    """A finite number of at least 0; a number that PyTorch's compiler stands in for passes."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
