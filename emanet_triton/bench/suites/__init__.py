"""The suites, each a function from a selection to its cases."""

from collections.abc import Callable, Iterator, Sequence

from emanet_triton.bench.case import Case
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suites import conv, em, model, post

SUITES: dict[str, Callable[[Selection], Iterator[Case]]] = {
    "em": em.cases,
    "conv": conv.cases,
    "post": post.cases,
    "model": model.cases,
}

SUMMARIES: dict[str, Callable[[Sequence[Row]], str]] = {  # what is said below a suite's table
    "conv": conv.summary,
}
