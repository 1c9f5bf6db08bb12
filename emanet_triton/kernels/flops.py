"""FLOPs of the operators for PyTorch's ``FlopCounterMode``, which counts matrix products only."""

import importlib.abc
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]

# The formula of each operator. It takes the operator's arguments, with shapes in the place of
# tensors, and ``out_shape``.
FORMULAS: dict[str, Callable[..., int]] = {}


def convolution(out: Shape, weight: Shape) -> int:
    """A convolution counts as a direct convolution, whatever algorithm computes it."""
    return 2 * math.prod(out) * math.prod(weight[1:])


def first_convolution(x: Shape, weight: Shape, *_, out_shape: Shape, **__) -> int:
    """FLOPs of a convolution whose first arguments are the input and the weight."""
    return convolution(out_shape, weight)


def register(namespace: str, formulas: dict[str, Callable[..., int]]) -> None:
    """Make the formulas of some operators of the namespace known to PyTorch's counter.

    Importing the counter imports Triton, so this function waits until the user imports the counter.
    """
    FORMULAS.update(formulas)
    if COUNTER in sys.modules:
        _add_formulas(namespace)
    elif not any(isinstance(finder, _AfterCounter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterCounter(namespace))


def _add_formulas(namespace: str) -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FORMULAS.items():
        operator = getattr(getattr(torch.ops, namespace), name, None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


class _AfterCounter(importlib.abc.MetaPathFinder):
    """Adds the formulas at the end of the import of PyTorch's counter."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            spec.loader.exec_module = self._and_add(spec.loader.exec_module)
        return spec

    def _and_add(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_formulas(self.namespace)
            sys.meta_path.remove(self)  # only now, because a search need not lead to an import

        return execute_and_add
