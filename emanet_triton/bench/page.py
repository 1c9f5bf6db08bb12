"""The page of results, docs/benchmarks.md: all of it is made here, from rows and from suites."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emanet_triton.bench.charts import Chart
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suite import Said
from emanet_triton.bench.suites import SUITES
from emanet_triton.bench.tables import (
    NOT_MEASURED,
    folded,
    on_gpu,
    paragraphs,
    suite_tables,
    table,
)

INTRODUCTION = """\
# Benchmarks

<!-- Made by `python -m emanet_triton.bench report`. Do not edit: change the suites. -->

    python -m emanet_triton.bench                                  # a short run
    python -m emanet_triton.bench em conv post model --csv here.csv
    python -m emanet_triton.bench model post --sizes 512x1024 768x768
    python -m emanet_triton.bench em model --neighbour spin        # beside one busy process
    python -m emanet_triton.bench compare before.csv here.csv      # exit code 1 on a regression
    make gpu-check STAGE=run                                       # on a GPU: gpu.md"""

EXPLANATION = """\
A *provider* is one way to compute a case: our code or a competitor. Each run times all providers of
a case alternately. On a CPU, a provider with threads of its own starts when PyTorch's threads rest.
If a provider is missing, the run prints the reason. A provider with a wrong result gets no time.
All weights are generated. Since commit e2a8b0c PyTorch asks for large pages of memory on a CPU, for
its own operators as for ours ([kernels.md](kernels.md#large-pages-on-a-cpu)).

`--sizes 512x1024 --batches 8 --dtypes bf16 --networks r50 --providers triton` narrow a run;
`--help` says which suites take `--batches` and `--dtypes`. `--rounds`, `--seconds` and
`--repeat-until 0.01` say how long it takes. `--csv` writes rows, `--plot` draws charts. A short run
leaves out `torch.compile`, and so does `post` with ms+flip on a CPU, because compiling takes
minutes. To run it anyway, name the provider: `--providers plain-compiled`.

[gpu.md](gpu.md) says what to run on a GPU and how it is timed, [h200.md](h200.md) what was
predicted for it and what is left.

A table cell such as `107, 2.76× (1.80–2.93)` means: the median is 107 ms; this is 2.76 times faster
than the first column; the 20th and 80th percentiles of this ratio over all rounds are 1.80 and
2.93. *Floor* is the smallest time that the copy bandwidth and the matmul rate of the same run
allow. On a CPU the matmul rate is the rate of a matrix product or of a convolution, whichever is
higher. *Noise* is the spread of the times of one fixed matrix product. The machines were shared:
read the ratios.

`python -m emanet_triton.bench report` makes this page and its charts from
[`benchmarks/results`](../benchmarks/results). A test fails if they disagree."""

ROOFLINE = """\
The lines are the ceilings that the copy bandwidth and the matmul rate of the machine set. Bytes and
FLOP of a case are the least that it needs. Winograd needs fewer FLOP than a plain convolution, so
that it can exceed the ceiling."""

EARLIER = """\
These rows were measured by suites that the benchmark no longer has. `eval` timed a whole
evaluation; today each evaluation prints its speed. `scale` timed several image sizes; today `post`
and `model` take `--sizes`. `int8` compared the fused network in bfloat16 with a prototype in 8-bit
integers: [kernels.md](kernels.md#int8-on-a-cpu)."""


@dataclass(frozen=True)
class Results:
    """What lies in a folder of results.

    Attributes:
        folder: the folder as the page links to it.
        files: name of each file → its rows.
        compiled: the rows of ``compiled.csv``, which ``ahead_of_time.gates`` writes.
    """

    folder: str
    files: dict[str, list[Row]]
    compiled: list[dict[str, str]]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.files.values() for row in rows]

    def link(self, name: str) -> str:
        return f"[`{name}`]({self.folder}/{name})"


def make_page(results: Results, charts: Sequence[Chart]) -> str:
    """The whole page as Markdown.

    Args:
        results: what was measured.
        charts: what the charts of the results show; their files lie in the folder of results.
    """
    parts = [INTRODUCTION, _suites(), EXPLANATION]
    for suite in SUITES.values():
        own = [row for row in results.rows if row.suite == suite.name]
        parts += [f"## {suite.title}", suite.text, suite.published(own)]
        parts += _tables(results, suite.name, suite.summary)
        if not any(map(on_gpu, own)):
            parts.append(f"On a GPU: {NOT_MEASURED}." if own else "Not measured yet.")
        parts += _images(results, charts, suite.name)
    rooflines = list(_images(results, charts, "roofline"))
    parts += ["## Arithmetic and memory traffic", ROOFLINE, *(rooflines or ["Not measured yet."])]
    parts += ["## What the compiler says of each kernel", *_compiled(results)]
    earlier = {row.suite: None for row in results.rows if row.suite not in SUITES}
    parts += ["## Earlier suites", EARLIER] if earlier else []
    for name in earlier:
        parts += [f"### {name}", *_tables(results, name, lambda rows: "")]
    return paragraphs(parts) + "\n"


def _suites() -> str:
    lines = [[f"`{suite.name}`", suite.measures] for suite in SUITES.values()]
    return table(lines, ["suite", "what it times, on CPU and GPU"], texts=2)


def _tables(results: Results, suite: str, said: Said) -> Iterator[str]:
    for name, rows in results.files.items():
        own = [row for row in rows if row.suite == suite]
        yield from suite_tables(results.link(name), own, said)


def _images(results: Results, charts: Sequence[Chart], kind: str) -> Iterator[str]:
    for chart in charts:
        if chart.kind == kind:
            yield f"![{chart.title}]({results.folder}/{chart.file})"


def _compiled(results: Results) -> Iterator[str]:
    """The worst of every kernel's configurations, by target and dtype."""
    rows = results.compiled
    if not rows:
        yield "Not compiled yet."
        return
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for kernel, dtype in sorted({(row["kernel"], row["dtype"]) for row in rows}):
        own = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        cells = [_compiled_cell([row for row in own if row["target"] == t]) for t in targets]
        lines.append([kernel, dtype, *cells])
    stacks = sum(int(row["stack"]) > 0 for row in rows)
    spills = f"{stacks} use a stack" if stacks else "none uses a stack: no register spills"
    yield (
        f"{len(rows)} compilations of {len({row['kernel'] for row in rows})} kernels for "
        f"{len(targets)} targets by Triton {', '.join(sorted({r['triton'] for r in rows}))}; "
        f"{spills}. A cell shows the worst of a kernel's configurations: the most registers of a "
        "thread at its start, the most shared memory of a program, and the fewest and the most "
        f"tensor-core instructions. {results.link('compiled.csv')} has each compilation."
    )
    worst = table(lines, ["kernel", "dtype", *targets], texts=2 + len(targets))
    yield folded("Worst case of every kernel, target and dtype", worst)


def _compiled_cell(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return ""
    registers, shared = (max(int(row[name]) for row in rows) for name in ("registers", "shared"))
    counts = sorted({int(row["count"]) for row in rows})
    names = sorted({row["tensor_core"] for row in rows} - {""})
    amount = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    cores = f", {amount} {'/'.join(names)}" if names else ""
    memory = f"{shared / 1024:.3g} KiB" if shared >= 1024 else f"{shared} B"
    return f"{registers} regs, {memory}{cores}"
