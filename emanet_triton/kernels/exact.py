"""Measure the error of an operator's output against a higher precision."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class Check(abc.ABC):
    """Measures the error of one output of an operator.

    Attributes:
        x: the main input, float32, float16 or bfloat16, on the device of the output.
        out_shape, out_dtype: shape and dtype of the output.
        plain: computes the output in a way that is trusted, in the precision of the backends.
    """

    x: Tensor
    out_shape: Sequence[int]
    out_dtype: torch.dtype
    plain: Callable[[], Tensor]

    @abc.abstractmethod
    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield the index of each piece of the output, and the exact piece; all of it in turn."""

    def allowed(self) -> float:
        """The largest error that a backend may make.

        This is twice the error of ``plain``, plus the error of rounding the largest value to the
        dtype of x.
        """
        error, largest = self._error(self.plain())
        return 2 * error + torch.finfo(self.x.dtype).eps / 2 * largest

    def error(self, found: Tensor) -> float:
        """Largest difference between ``found`` and the exact output; NaN if either has a NaN."""
        return self._error(found)[0]

    def poison(self) -> None:
        """Fill with NaN the memory that PyTorch's allocator will give to the next output.

        An element that a backend does not write is then NaN. The memory is twice as large as an
        output, since a backend may allocate something else first.
        """
        held = []
        with contextlib.suppress(torch.OutOfMemoryError):
            for _ in range(2):
                device, dtype = self.x.device, self.out_dtype
                held.append(torch.full(self.out_shape, torch.nan, dtype=dtype, device=device))

    def _error(self, found: Tensor) -> tuple[float, float]:
        """Largest difference from the exact output, and the exact output's largest magnitude."""
        error = largest = torch.zeros((), dtype=torch.float64, device=self.x.device)
        for index, exact in self.pieces():
            difference = found[index].to(exact.dtype) - exact
            error = torch.maximum(error, difference.abs_().amax().double())
            largest = torch.maximum(largest, exact.abs_().amax().double())
        return error.item(), largest.item()


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the exact output if ``dtype`` is the dtype of x."""
    return torch.float64 if dtype == torch.float32 else torch.float32
