"""A case of a suite: one problem, and the providers that solve it."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.options import Selection


class Absent(Exception):  # noqa: N818 (it is not an error)
    """A provider that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One problem that several providers solve.

    Attributes:
        suite: the name of its suite.
        name: words and k=v, the key that joins the rows of different runs.
        providers: name → a function that makes the provider's call and all that the call needs.
            The function may raise ``Absent``.
        baseline: the provider that ratios refer to. It runs first.
        error: the error of a result against the suite's reference. A NaN never passes.
        bound: the largest error that passes, or a function of the provider's name and the errors
            of all providers so far, its own included.
        prepare: makes what the providers share, such as inputs. Memory that it allocates does not
            count as peak memory; memory that a provider allocates for its weights does.
        floor: the least bytes and FLOPs.
        dtype: the dtype whose matmul rate is the ceiling.
        peak: whether to measure peak memory.
        wall: on a GPU, whether to time by wall clock until the device is idle.
        graph: on a GPU, whether to time replays of a CUDA graph where the call can be captured.
            Every call must give the same result.
        own_threads: the providers whose threads on a CPU are not PyTorch's.
    """

    suite: str
    name: str
    providers: Mapping[str, Callable[[], Call]]
    baseline: str
    error: Callable[[Any], float]
    bound: float | Callable[[str, Mapping[str, float]], float]
    prepare: Callable[[], object] | None = None
    floor: Cost | None = None
    dtype: str = "fp32"
    peak: bool = False
    wall: bool = False
    graph: bool = False
    own_threads: Collection[str] = ()


Cases = Callable[[Selection], Iterable[Case]]


def worst(errors: Iterable[float]) -> float:
    """The largest error. NaN is the worst."""
    return max(errors, key=lambda error: (math.isnan(error), error))
