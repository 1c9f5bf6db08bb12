"""How a module's operators are registered with PyTorch, the first time and at every reload."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels import flops

NAMESPACE = "emanet_triton"


class Operator(NamedTuple):
    """An operator as PyTorch sees it.

    Attributes:
        schema: its name, arguments and results.
        run: computes it.
        fake: makes results of the right shape, dtype and memory format for meta and fake tensors;
            for an empty batch its results are returned and ``run`` is not called.
        key: the dispatch key under which ``run`` is found: of all devices unless given.
    """

    schema: str
    run: Callable
    fake: Callable
    key: str = "CompositeExplicitAutograd"


def register(module: str, *operators: Operator) -> None:
    """Register the operators of a module, in place of those that it registered before.

    PyTorch refuses to define an operator twice. So the libraries are kept where a reload finds
    them, on PyTorch's own object for the namespace; destroying one takes its operators away.
    """
    libraries = vars(getattr(torch.ops, NAMESPACE)).setdefault("libraries", {})
    if module in libraries:
        # Letting go of it would leave dead operators behind in PyTorch 2.11.
        libraries[module]._destroy()
    library = libraries[module] = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema, run, fake, key in operators:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, _unless_empty(run, fake), key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    flops.register(NAMESPACE)


def _unless_empty(run: Callable, fake: Callable) -> Callable:
    def run_or_fake(first: Tensor, *rest):
        return run(first, *rest) if first.numel() else fake(first, *rest)

    return run_or_fake
