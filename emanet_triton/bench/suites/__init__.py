"""The suites, each a function from a selection to its cases."""

from collections.abc import Callable, Iterator, Sequence

from emanet_triton.bench.case import Case
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suites import conv, em, eval, model, post, scale, train_mem

SUITES: dict[str, Callable[[Selection], Iterator[Case]]] = {
    "em": em.cases,
    "conv": conv.cases,
    "post": post.cases,
    "model": model.cases,
    "train-mem": train_mem.cases,
    "eval": eval.cases,
    "scale": scale.cases,
}

SUMMARIES: dict[str, Callable[[Sequence[Row]], str]] = {  # what is said below a suite's table
    "conv": conv.summary,
    "eval": eval.summary,
    "scale": scale.summary,
}
