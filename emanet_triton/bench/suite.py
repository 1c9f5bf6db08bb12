"""A suite of the benchmark: one value with all that the benchmark knows about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emanet_triton.bench.case import Cases
from emanet_triton.bench.rows import Row

Said = Callable[[Sequence[Row]], str]


def _nothing(rows: Sequence[Row]) -> str:
    return ""


@dataclass(frozen=True)
class Suite:
    """What a suite measures, and how its results are shown.

    Attributes:
        name: its name on the command line and in its rows.
        title: the heading of its section on the page of results.
        measures: what it times, in a few words.
        cases: makes the cases of a selection. It must be a function of a module: other processes
            import it.
        text: Markdown below the heading.
        published: Markdown that compares all rows of the suite with published figures.
        summary: lines about the rows of one run, without Markdown.
        chart: whether the page shows a chart of its ratios.
    """

    name: str
    title: str
    measures: str
    cases: Cases
    text: str = ""
    published: Said = _nothing
    summary: Said = _nothing
    chart: bool = True
