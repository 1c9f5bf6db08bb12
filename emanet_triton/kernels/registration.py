"""Registers the operators of a module with PyTorch, also after a reload of the module."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels import flops

NAMESPACE = "emanet_triton"


class Operator(NamedTuple):
    """An operator as PyTorch sees it.

    Attributes:
        name: its name in ``torch.ops.emanet_triton``.
        run: computes the results. The annotations of its arguments and its results are the
            operator's schema.
        fake: makes results of the right shape, dtype and memory format for meta and fake tensors.
            For an empty batch the operator returns these results and does not call ``run``.
        key: the dispatch key of ``run``; the default is for all devices.
        mutates: names of the arguments that ``run`` overwrites.
        flops: the formula for ``flops.FORMULAS``. No FLOPs are counted without a formula.
    """

    name: str
    run: Callable
    fake: Callable
    key: str = "CompositeExplicitAutograd"
    mutates: tuple[str, ...] = ()
    flops: Callable[..., int] | None = None

    def schema(self) -> str:
        schema = torch.library.infer_schema(self.run, op_name=self.name, mutates_args=self.mutates)
        # A compiled graph is specialised to strides, dilations and numbers of EM steps.
        return schema.replace("SymInt ", "int ")


def register(module: str, *operators: Operator) -> None:
    """Register the operators of a module, in place of those that it registered before.

    PyTorch refuses to define an operator twice. So the libraries are kept where a reload finds
    them, on PyTorch's own object for the namespace. To destroy a library removes its operators.
    """
    libraries = vars(getattr(torch.ops, NAMESPACE)).setdefault("libraries", {})
    if module in libraries:
        # Without this call, dead operators stay behind in PyTorch 2.11.
        libraries[module]._destroy()
    library = libraries[module] = torch.library.Library(NAMESPACE, "FRAGMENT")
    for operator in operators:
        name, fake = operator.name, operator.fake
        library.define(operator.schema())
        library.impl(name, _unless_empty(operator.run, fake), operator.key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    flops.register(NAMESPACE, {own.name: own.flops for own in operators if own.flops})


def _unless_empty(run: Callable, fake: Callable) -> Callable:
    def run_or_fake(first: Tensor, *rest):
        return run(first, *rest) if first.numel() else fake(first, *rest)

    return run_or_fake
