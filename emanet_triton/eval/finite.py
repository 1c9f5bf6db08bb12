"""Refusing a network that overflows or is damaged, before its labels are believed.

A fused ReLU turns NaN into 0, so the logits of such a network can be finite and mean nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.metric import as_matrix
from emanet_triton.kernels.out_of_memory import MemoryWatch


def check_network(predictor: Predictor, image: np.ndarray) -> None:
    """Run the network on one input of an image, and look at what every module of it returns.

    Where memory does not suffice nothing is said: the evaluation will.

    Raises:
        InputError: the first module whose output is not finite, by name.
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
                    f"{name} of the {predictor.network_name} network returns values that are not "
                    f"finite{_hint(predictor)}"
                )


def matrices_of(counts: list[Tensor], names: list[str], predictor: Predictor) -> Tensor:
    """The confusion matrices of a batch, int64 [M, C, C], of its ``confusion_counts``.

    The labels of an image are no class where its logits were not finite, so the counts, which are
    fetched anyway, tell it; the labels of a data set have been checked before.

    Raises:
        InputError: the logits of an image of the batch were not finite.
    """
    try:
        return torch.stack([as_matrix(counted.cpu()) for counted in counts])
    except ValueError:
        raise InputError(
            f"the logits of the network are not finite for {', '.join(names)}{_hint(predictor)}"
        ) from None


def _hint(predictor: Predictor) -> str:
    """What helps where a network overflows."""
    fp16 = predictor.precision == "fp16"
    return "; --precision bf16 has a wider range than fp16" if fp16 else ""


@contextmanager
def _largest_values(model: nn.Module, largest: dict[str, Tensor]) -> Iterator[None]:
    """Collect the largest absolute value of every module's output, in the order of the calls."""

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.numel():
                largest[name] = torch.linalg.vector_norm(output, torch.inf)

        return hook

    named = [(name or "the output", module) for name, module in model.named_modules()]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
