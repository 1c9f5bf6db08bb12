"""An output compared with the exact one: how far it is off, and where first."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from emanet_triton.bench.clocks import poison
from emanet_triton.bench.rows import PASSED

SHOWN = 5  # wrong elements of an output


@dataclass(frozen=True)
class Wrong:
    """One wrong element."""

    index: list[int]
    got: float
    want: float


@dataclass(frozen=True)
class Compared:
    """An output compared with the exact one.

    Attributes:
        output: its name.
        error: the largest difference; None if that is not a number.
        bound: the largest difference that passes.
        wrong: how many elements are further off than the bound, or not a number.
        elements: how many elements there are.
        first: the first wrong elements.
    """

    output: str
    error: float | None
    bound: float
    wrong: int
    elements: int
    first: list[Wrong]

    def __str__(self) -> str:
        """What is wrong with the output."""
        at = self.first[0]
        return (
            f"{self.output}: {self.wrong} of {self.elements} wrong, the first at "
            f"{at.index}: got {at.got:.6g}, want {at.want:.6g}, bound {self.bound:.2g}"
        )


@dataclass(frozen=True)
class Finding:
    """The result of a case of correctness.

    Attributes:
        family, case: what was checked.
        gate: "passed", "absent: why" or "failed: why".
        seconds: duration of the check.
        outputs: each output compared with the exact one.
    """

    family: str
    case: str
    gate: str
    seconds: float = 0.0
    outputs: tuple[Compared, ...] = ()


def gate_of(outputs: list[Compared]) -> str:
    """Whether all outputs are right, or what is wrong with the first wrong one."""
    wrong = [str(compared) for compared in outputs if compared.wrong]
    return f"failed: {wrong[0]}" if wrong else PASSED


def close(
    output: str,
    got: Tensor,
    want: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Compared:
    """Compare with a bound: twice plain PyTorch's error, and one rounding of the largest value.

    For float32 in ieee it is four times plain PyTorch's error, which is nothing but the rounding of
    sums: a kernel that adds one product after another loses more than cuBLAS and cuDNN, which add
    sums of parts (up to 3.7 times as much on an H200).

    Args:
        output: its name.
        got: the output of the kernels.
        want: the output in float64.
        plain: the output of plain PyTorch in ``dtype``.
        dtype: of the inputs.
        precision: how products of float32 are computed.
    """
    largest = want.abs().max().item()
    allowed = (plain.double() - want).abs().max().item()
    factor = 4 if (dtype, precision) == (torch.float32, "ieee") else 2
    bound = factor * allowed + torch.finfo(dtype).eps / 2 * largest
    difference = (got.double() - want).abs()
    return _compared(output, got, want, ~(difference <= bound), difference, bound)


def equal(output: str, got: Tensor, want: Tensor, counts: Tensor | None = None) -> Compared:
    """Compare to the last bit, only where ``counts`` is true if it is given."""
    difference = (got.double() - want.double()).abs()
    if counts is not None:
        difference = difference * counts
    return _compared(output, got, want, difference != 0, difference, 0.0)


def _compared(
    output: str, got: Tensor, want: Tensor, wrong: Tensor, difference: Tensor, bound: float
) -> Compared:
    error = difference.max().item()
    places = wrong.flatten().nonzero()[:SHOWN, 0]  # takes less memory than indices of all axes
    indices = torch.stack(torch.unravel_index(places, wrong.shape), 1).tolist()
    first = [Wrong(index, got[*index].item(), want[*index].item()) for index in indices]
    finite = error if error == error else None
    return Compared(output, finite, bound, int(wrong.sum()), wrong.numel(), first)


def poisoned(run: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[Tensor, ...]:
    """The results of the last of three runs: the memory of the ones before is filled with NaN.

    PyTorch's allocator nearly always gives the same memory out again, so that an element which
    nobody writes is not a number. The second run makes a launcher's tape, the last plays it.
    """
    for _ in range(2):
        results = run()
        poison(results, device)
        del results
    return run()
