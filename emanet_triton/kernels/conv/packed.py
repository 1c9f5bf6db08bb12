"""Copies of weights in oneDNN's own layout, kept beside the weights."""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")

COPIES = WeakTensorKeyDictionary()  # weight → (its state and the purpose of the copy, the copy)


def kept(weight: Tensor, purpose: object, make: Callable[[], T]) -> T:
    """The copy that ``make`` returns for a weight. It is made again if the weight has changed.

    Args:
        weight: of a convolution. A tensor of inference mode does not count its changes, so its copy
            is made at each call. PyTorch does not count changes through ``weight.data`` or NumPy,
            so they are not noticed.
        purpose: all else that the copy depends on. Only the copy of the last purpose is kept.
        make: makes the copy.
    """
    if weight.is_inference():
        return make()
    state = weight.data_ptr(), weight._version, purpose
    of_state, copy = COPIES.get(weight, (None, None))
    if of_state != state:
        copy = make()
        COPIES[weight] = state, copy
    return copy
