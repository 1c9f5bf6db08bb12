"""FLOPs of the operators for PyTorch's ``FlopCounterMode``, which counts matrix products only.

A convolution counts as a direct convolution, whatever algorithm computes it. The operators that
make labels have no matrix products.
"""

import importlib.abc
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _convolution(out: Shape, weight: Shape) -> int:
    return 2 * math.prod(out) * math.prod(weight[1:])


def _conv(x: Shape, weight: Shape, *_, out_shape: Shape, **__) -> int:
    return _convolution(out_shape, weight)


def _conv_add(residual: Shape, x: Shape, weight: Shape, *_, **__) -> int:
    return _convolution(residual, weight)


def _bottleneck(x: Shape, weights: Sequence[Shape], *_, **__) -> int:
    pixels = (x[0], *x[2:])
    return sum(_convolution((*pixels, weight[0]), weight) for weight in weights)


def _em_attention(feats: Shape, bases: Shape, num_stages: int, *_, **__) -> int:
    """Two products a stage, and the reconstruction."""
    return 2 * math.prod(feats) * bases[2] * (2 * num_stages + 1)


def _em_attention_block(
    feats, bases, mid_weight, mid_bias, out_weight, out_bias, num_stages, *_, **__
) -> int:
    """The EM attention and both 1x1 convolutions, although the first is never formed."""
    layers = 2 * math.prod(feats) * (mid_weight[0] + out_weight[0])
    return _em_attention(feats, bases, num_stages) + layers


FORMULAS: dict[str, Callable[..., int]] = {
    "bottleneck": _bottleneck,
    "conv_bias_act": _conv,
    "conv_cpu": _conv,
    "conv_cpu_add_": _conv_add,
    "em_attention": _em_attention,
    "em_attention_block": _em_attention_block,
    "winograd_conv": _conv,
}


def register(namespace: str) -> None:
    """Make the formulas of the namespace's operators known to PyTorch's counter.

    Importing the counter imports Triton, so this waits until the user imports it.
    """
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
            sys.meta_path.remove(self)  # only now: somebody may search without importing

        return execute_and_add
