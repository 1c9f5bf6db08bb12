"""The calls of this package's operators that a network makes on a GPU, found without a GPU.

The fused network runs on tensors without data (PyTorch's meta device). They take the same way
through it as tensors on a GPU. Every call is recorded with all of its arguments.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.bench.networks import architecture, make_protocol
from emanet_triton.inference.inputs import cut_windows
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import Size, view_sizes
from emanet_triton.kernels.device import DTYPE_NAMES, DTYPES
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.emanet import EMANet, FusedEMANet
from emanet_triton.models.fused import fuse

NAMESPACE = "emanet_triton"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def __str__(self) -> str:
        return f"{DTYPE_NAMES.get(self.dtype, self.dtype)}{list(self.shape)}"

    def empty(self, device: str = "meta") -> Tensor:
        """A new tensor of this shape, stride and dtype, with any values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class OperatorCall:
    """One call of an operator. It can be a key: two calls with the same arguments are equal.

    Attributes:
        name: the operator's name in ``torch.ops.emanet_triton``.
        arguments: name and value of each argument, in the operator's order. A ``TensorSpec``
            stands for a tensor, a tuple for a list.
    """

    name: str
    arguments: tuple[tuple[str, object], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{n}={_text(value)}' for n, value in self.arguments)})"

    def but(self, **changes: object) -> "OperatorCall":
        """The same call, but some arguments have other values."""
        return replace(self, arguments=tuple((n, changes.get(n, v)) for n, v in self.arguments))

    def values(self, device: str = "meta") -> list[Any]:
        """The arguments, with a new tensor in the place of each ``TensorSpec``."""
        return [_with_tensors(value, device) for _, value in self.arguments]

    def run(self, device: str = "meta") -> Any:
        """Make the call with new tensors. On the meta device nothing is computed."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name)(*self.values(device))


class Recorder(TorchDispatchMode):
    """Counts the calls of this package's operators within, in ``calls``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[OperatorCall] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None) -> object:
        if operator.namespace == NAMESPACE:  # such as emanet_triton::expand_reduce
            names = [argument.name for argument in operator._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            described = tuple((name, _described(value)) for name, value in given.items())
            self.calls[OperatorCall(operator.name().partition("::")[2], described)] += 1
        return operator(*args, **(kwargs or {}))


def recorded(function: Callable[[], object]) -> list[OperatorCall]:
    """The operator calls that a function makes, each once."""
    with torch.inference_mode(), Recorder() as recorder:
        function()
    return list(recorder.calls)


@functools.cache
@torch.inference_mode()
def walk(
    network: str,
    mode: str,
    size: Size,
    batch: int = 1,
    dtype: str = "bf16",
    at_once: int | None = None,
    tiny: bool = False,
    merged: bool = False,
) -> Counter[OperatorCall]:
    """The operator calls of the fused network and of the labels after it, with their numbers.

    Args:
        network: "r50", "r101" or the demonstration's name.
        mode: "whole", or "slide" with the published models' windows of 769x769.
        size: (height, width) of the images in pixels.
        batch: images at once.
        dtype: the network's, "fp32", "bf16" or "fp16".
        at_once: number of windows that run as one batch; by default all, as on a GPU.
        tiny: a network of few channels, and small windows.
        merged: whether the head's two convolutions of its input run as one, as on a CPU.
    """
    protocol = make_protocol(mode, size, tiny)
    (view,) = view_sizes(protocol, size, ms_flip=False)
    images = torch.empty(batch, 3, *view, device="meta")
    fused = _fused(network, dtype, tiny)
    fused.decode_head.shared_conv.merged = merged
    with Recorder() as recorder:
        logits = torch.cat([fused(windows) for windows in cut_windows(images, protocol, at_once)])
        packed = logits.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4).flatten(2)
        tables = tap_tables(protocol, size, False, packed.device)
        resample_labels(packed, *tables, backend="triton")
    return recorder.calls


@functools.cache
def _fused(network: str, dtype: str, tiny: bool) -> FusedEMANet:
    """A network without weights, with the operators that it has on a GPU."""
    fused = fuse(_model(network, tiny), dtype=DTYPES[dtype])
    assert isinstance(fused, FusedEMANet)
    fused.decode_head.backend = "triton"
    return fused


@functools.cache
def _model(network: str, tiny: bool) -> EMANet:
    with torch.device("meta"):
        return EMANet(architecture(network, tiny), make_protocol("whole", (1, 1))).eval()


def _described(value: object) -> object:
    if isinstance(value, Tensor):
        return TensorSpec.of(value)
    return tuple(map(_described, value)) if isinstance(value, list | tuple) else value


def _with_tensors(value: object, device: str) -> object:
    if isinstance(value, TensorSpec):
        return value.empty(device)
    return [_with_tensors(part, device) for part in value] if isinstance(value, tuple) else value


def _text(value: object) -> str:
    return f"({', '.join(map(_text, value))})" if isinstance(value, tuple) else str(value)
