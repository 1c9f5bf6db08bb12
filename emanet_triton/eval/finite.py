"""Checks that refuse a network that overflows or is damaged.

A fused ReLU turns NaN into 0, so such a network can have finite logits that mean nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.eval.metric import as_matrix
from emanet_triton.inference.predictor import Predictor
from emanet_triton.kernels.out_of_memory import MemoryWatch


def check_network(predictor: Predictor, image: np.ndarray) -> None:
    """Run the network on one input of an image, and check the output of every module.

    If memory runs out, the check is left out; the evaluation will report the lack of memory.

    Raises:
        InputError: an output is not finite; the message names the first such module.
    """
    largest: dict[str, Tensor] = {}
    watch = MemoryWatch(predictor.device)
    try:
        with _largest_values(predictor.model, largest):
            predictor.first_logits(image)
    except Exception as error:  # memory runs out under many names
        if not watch.explains(error):
            raise
    if largest:
        finite = torch.stack([value.float() for value in largest.values()]).isfinite().tolist()
        for name, is_finite in zip(largest, finite, strict=True):
            if not is_finite:
                raise InputError(
                    f"{name} of the {_described(predictor)} returns values that are not finite"
                    f"{_hint(predictor)}"
                )


def finite_matrices(
    counts: list[Tensor], names: list[str], predictors: Sequence[Predictor]
) -> Tensor:
    """The confusion matrices of a batch.

    ``Predictor`` gives every pixel of an image with non-finite logits the label ``NOT_FINITE``,
    which is no class. ``confusion_counts`` counts such pixels apart, so no further transfer from
    the device is needed.

    Args:
        counts: M results of ``confusion_counts``.
        names: of the images.
        predictors: M: for each result the predictor whose labels are checked with it. Other
            predicted labels in a result are checked with an earlier result.

    Returns:
        int64 [M, C, C].

    Raises:
        InputError: the logits of an image of the batch were not finite.
    """
    return torch.stack(
        [_finite_matrix(c, names, p) for c, p in zip(counts, predictors, strict=True)]
    )


def _finite_matrix(counted: Tensor, names: list[str], predictor: Predictor) -> Tensor:
    try:
        return as_matrix(counted.cpu())
    except ValueError:
        raise InputError(
            f"the logits of the {_described(predictor)} are not finite for {', '.join(names)}"
            f"{_hint(predictor)}"
        ) from None


def _described(predictor: Predictor) -> str:
    precision = f" in {predictor.precision}" if predictor.precision else ""
    return f"{predictor.network_name} network{precision}"


def _hint(predictor: Predictor) -> str:
    """Advice for a network that overflows."""
    return "; bf16 has a wider range than fp16" if predictor.precision == "fp16" else ""


@contextmanager
def _largest_values(model: nn.Module, largest: dict[str, Tensor]) -> Iterator[None]:
    """Collect the largest absolute value of each module's output, in the order of the calls."""

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                largest[name] = torch.linalg.vector_norm(output, torch.inf)

        return hook

    named = [(name or "the output", module) for name, module in model.named_modules()]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
