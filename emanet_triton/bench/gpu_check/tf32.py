"""TF32 as Triton's products read it: plain PyTorch on operands that are cut off."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOST = 13  # bits of a float32's mantissa that TF32 lacks

_ATEN: Any = torch.ops.aten
# By operation, the positions of the two arguments that are multiplied.
PRODUCTS = {
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.convolution.default: (0, 1),
}


def cut(x: Tensor) -> Tensor:
    """A float32 tensor with the bits zero that TF32 lacks: rounded towards zero, not to nearest."""
    return (x.view(torch.int32) >> LOST << LOST).view(torch.float32)


class CutOperands(TorchDispatchMode):
    """A context in which PyTorch's products of float32 read operands that are cut off.

    A GPU's tensor cores ignore the bits that TF32 lacks. Triton hands its operands over as they
    are; cuBLAS and cuDNN may round them first, or not use TF32 at all, so that their error tells
    little about Triton's. Gradient mode may be on or off, but not inference mode, in which PyTorch
    does not show the context its products.
    """

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = list(args)
        for position in PRODUCTS.get(function, ()):
            if given[position].dtype == torch.float32:
                given[position] = cut(given[position])
        return function(*given, **(kwargs or {}))
