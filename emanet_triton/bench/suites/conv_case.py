"""What all cases of the suite conv share: the gate, the baseline, how they are timed."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from emanet_triton.bench.case import Case, worst
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.options import Selection
from emanet_triton.bench.runtimes import RUNTIMES

NAME = "conv"
# The largest relative errors in norm that pass. Winograd's error in bfloat16 is four to six times
# that of a plain convolution of these inputs. A product in TF32 makes an error of about 5e-4.
MOST_ERROR = {"fp32": 3e-6, "bf16": 2e-2, "fp16": 2.5e-3}
MOST_ERROR_TF32X3 = 3e-5

Outputs = Tensor | tuple[Tensor, ...]


class Problem(Protocol):
    """The inputs of a case."""

    def exact(self) -> Outputs:
        """The result in float64, or several results."""


P = TypeVar("P", bound=Problem)


def make_case(
    selection: Selection,
    name: str,
    make: Callable[[], P],
    providers: Iterable[str],
    provide: Callable[[str, Callable[[], P]], Call],
    floor: Cost,
    dtype: str,
) -> Case:
    """A case whose baseline is PyTorch's own convolution, "torch".

    Args:
        selection: what the user asked for.
        name: the case's name.
        make: makes the inputs.
        providers: the names of all providers, with "torch".
        provide: name of a provider, ``make`` → the provider's call.
        floor: the least bytes and FLOPs.
        dtype: of the inputs.
    """
    problem = functools.cache(make)
    exact = functools.cache(lambda: problem().exact())
    return Case(
        suite=NAME,
        name=name,
        providers=selection.pick(
            {name: functools.partial(provide, name, problem) for name in providers},
            "torch",
            ("compiled",) if selection.short else (),
        ),
        baseline="torch",
        error=lambda got: relative_error(got, exact()),
        bound=functools.partial(bound, dtype),
        prepare=problem,
        floor=floor,
        dtype=dtype,
        graph=True,
        own_threads=tuple(RUNTIMES),
    )


def bound(dtype: str, provider: str, _: Mapping[str, float]) -> float:
    """The largest error of a provider that passes."""
    return MOST_ERROR_TF32X3 if provider == "triton-tf32x3" else MOST_ERROR[dtype]


def relative_error(got: Outputs, want: Outputs) -> float:
    """The norm of the difference, divided by that of the wanted tensor; the worst of several."""
    found, wanted = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return worst(((a - b).norm() / b.norm()).item() for a, b in pairs)
