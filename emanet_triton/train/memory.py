"""The memory of a training step, counted tensor by tensor."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class SavedTensors:
    """Counts the memory that autograd keeps from the forward to the backward pass.

    A context manager for forward passes. A storage counts once, however many operations save it;
    the storages of ``model`` do not count. It also counts on the meta device and for fake tensors,
    where nothing is allocated.

    Args:
        model: whose parameters and buffers are not counted.

    Attributes:
        bytes: counted so far.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._seen = {_storage(tensor) for tensor in own}
        self._kept: list[Tensor] = []  # so that no later storage gets the place of an earlier one
        self.bytes = 0
        self._hooks = saved_tensors_hooks(self._pack, lambda packed: packed)

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self._kept.append(tensor.detach())
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers; with averaged weights both sets.
        gradients: of the trained parameters.
        optimizer: state of the optimizer.
        saved: what autograd keeps for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.saved


def tensor_bytes(tensors: Any) -> int:
    """The bytes of tensors, anywhere in nested dicts and lists."""
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    if isinstance(tensors, dict):
        return sum(map(tensor_bytes, tensors.values()))
    if isinstance(tensors, (list, tuple)):
        return sum(map(tensor_bytes, tensors))
    return 0


def step_memory(network: nn.Module, optimizer_state: Any, saved: int, averaged: bool) -> StepMemory:
    """Put the parts together.

    Args:
        network: the trained network.
        optimizer_state: the tensors of its optimizer, anywhere in nested dicts and lists.
        saved: as ``SavedTensors`` counts.
        averaged: whether averaged weights are kept, too.
    """
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    return StepMemory(
        weights * (2 if averaged else 1), trained, tensor_bytes(optimizer_state), saved
    )
