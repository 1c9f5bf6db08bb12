"""A case of a suite: one problem, and the providers that solve it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Cost


class Absent(Exception):  # noqa: N818 (it is not an error)
    """A provider that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One problem that several providers solve.

    Attributes:
        suite: its suite's name.
        name: words and k=v, the key that joins rows of different runs.
        providers: name → makes its call, with whatever that needs; may raise ``Absent``.
        baseline: the provider that ratios refer to; it runs first.
        error: of a result, against the suite's reference; not a number never passes.
        bound: the largest error that passes, or a function of the provider's name and the errors
            of all so far, its own included.
        prepare: makes what the providers share, such as inputs. What it allocates is not counted
            as peak memory; what a provider allocates, its weights included, is.
        floor: least bytes and FLOPs.
        dtype: whose matmul rate is the ceiling.
        predicted_ms: provider → what was forecast before anything was measured.
        peak: whether to measure peak memory.
        wall: on a GPU, time by wall clock until the device is idle.
        graph: on a GPU, time the replays of a CUDA graph of every provider that can be captured.
            Each call gives the same result anew.
    """

    suite: str
    name: str
    providers: Mapping[str, Callable[[], Call]]
    baseline: str
    error: Callable[[object], float]
    bound: float | Callable[[str, Mapping[str, float]], float]
    prepare: Callable[[], object] | None = None
    floor: Cost | None = None
    dtype: str = "fp32"
    predicted_ms: Mapping[str, str] = field(default_factory=dict)
    peak: bool = False
    wall: bool = False
    graph: bool = False
