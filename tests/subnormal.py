"""Finds subnormal numbers in the results of PyTorch's operations."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def count_subnormal(tensor: Tensor) -> int:
    """How many numbers of a tensor are subnormal."""
    sizes = tensor.detach().abs()
    return int(((sizes > 0) & (sizes < torch.finfo(tensor.dtype).tiny)).sum())


class SubnormalResults(TorchDispatchMode):
    """Notes the operations of the calling thread that return subnormal numbers.

    Attributes:
        found: names of these operations.
        seen: how many operations returned floating-point numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.seen += 1
                if count_subnormal(leaf):
                    self.found.append(str(func))
        return result
