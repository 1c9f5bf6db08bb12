"""The blocks of figures in docs/benchmarks.md, in Markdown, from measured rows."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from emanet_triton.bench.charts import Chart, charts_of
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suites import conv as conv_suite
from emanet_triton.bench.suites import em as em_suite
from emanet_triton.bench.suites import eval as eval_suite
from emanet_triton.bench.suites import scale as scale_suite
from emanet_triton.bench.suites import train_mem as train_mem_suite
from emanet_triton.bench.tables import folded, joined, number, on_gpu, run, runs, table
from emanet_triton.models.zoo import ZOO, Published

NOT_MEASURED = "not measured"
MODEL_COLUMNS = ("plain-fp32", "fused-fp32", "fused-bf16")  # whose images a second are compared


@dataclass(frozen=True)
class Results:
    """What lies in a folder of results.

    Attributes:
        folder: as the page's links name it.
        files: name of each file → its rows.
        compiled: the rows of ``compiled.csv``, as ``ahead_of_time.gates`` writes them.
    """

    folder: str
    files: dict[str, list[Row]]
    compiled: list[dict[str, str]]

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.files.values() for row in rows]

    def of(self, suite: str) -> list[Row]:
        return [row for row in self.rows if row.suite == suite]

    def link(self, name: str) -> str:
        return f"[`{name}`]({self.folder}/{name})"

    def images(self, kind: str) -> list[str]:
        """Links to the charts of a kind."""
        return [self._image(chart) for chart in charts_of(self.rows) if chart.kind == kind]

    def _image(self, chart: Chart) -> str:
        return f"![{chart.title}]({self.folder}/{chart.name}.svg)"


def em(results: Results) -> str:
    """The EM operators, and what was forecast for a GPU beside what was measured there."""
    lines = []
    for key, predicted in em_suite.PREDICTED_MS.items():
        operation, dtype, batch, positions = key
        name = f"{operation} B={batch} N={positions} {dtype}"
        times = [
            f"{number(row.p50_ms)} ({row.device})"
            for row in results.of("em")
            if on_gpu(row) and row.case.startswith(name) and row.provider == "triton" and row.p50_ms
        ]
        measured = ", ".join(times) or NOT_MEASURED
        lines.append([name, measured, predicted, em_suite.MODELLED_MS[key]])
    columns = ["on a GPU", "measured, ms", "forecast of a review, ms", "of the cost model, ms"]
    forecasts = table(lines, columns, "lrrr")
    return joined([_suite(results, "em"), *results.images("ratios_em"), forecasts])


def conv(results: Results) -> str:
    """The convolutions of both networks, each and summed up."""
    return joined([_suite(results, "conv", conv_suite.totals), *results.images("ratios_conv")])


def model(results: Results) -> str:
    """Images a second beside the published figures, then every case."""
    rows = [row for row in results.of("model") if on_gpu(row)]
    gpus = list(dict.fromkeys(row.device for row in rows)) or [NOT_MEASURED]
    lines = []
    for (network, mode, published), gpu in itertools.product(_published(), gpus):
        case = f"{network} {mode} 1024x2048 from=host"
        times = {r.provider: r.p50_ms for r in rows if (r.case, r.device) == (case, gpu)}
        cells = [f"{1e3 / t:.1f}" if (t := times.get(n)) else NOT_MEASURED for n in MODEL_COLUMNS]
        lines.append([network, mode, f"{published.fps:.2f}", gpu, *cells])
    columns = ["network", "inference", "published images/s (V100)", "GPU", *MODEL_COLUMNS]
    rates = table(lines, columns, "llrlrrr")
    return joined([rates, _suite(results, "model"), *results.images("ratios_model")])


def post(results: Results) -> str:
    """From logits to labels."""
    return joined([_suite(results, "post"), *results.images("ratios_post")])


def train_mem(results: Results) -> str:
    """Memory of a training step beside the published figures, then every case."""
    rows = [row for row in results.of("train-mem") if row.provider == "ours"]
    devices = list(dict.fromkeys(row.device for row in rows if on_gpu(row)))
    lines = []
    for network, mode, published in _published():
        crop = train_mem_suite.CROPS[mode]
        case = train_mem_suite.case_name(network, crop, 2)
        peaks = {r.device: r.peak_mb for r in rows if r.case == case}
        ours = [f"{peaks[d] / 1e3:.1f}" if peaks.get(d) else NOT_MEASURED for d in devices]
        crop = f"{crop[0]}x{crop[1]}"
        lines.append([network, crop, f"{published.memory_gb}", *(ours or [NOT_MEASURED])])
    own = [f"ours, GB ({device})" for device in devices] or ["ours, GB (GPU)"]
    columns = ["network", "2 images of", "published, GB (V100)", *own]
    return joined([table(lines, columns, "llr" + "r" * len(own)), _suite(results, "train-mem")])


def evaluation(results: Results) -> str:
    """From files to the metric."""
    return _suite(results, "eval", eval_suite.summary)


def scale(results: Results) -> str:
    """Time and memory against size, and their fitted growth."""
    return joined([_suite(results, "scale", scale_suite.summary), *results.images("scale")])


def roofline(results: Results) -> str:
    """FLOP/s against arithmetic intensity."""
    return joined(results.images("roofline")) or "Not measured yet."


def compiled(results: Results) -> str:
    """The worst of every kernel's configurations, by target and dtype."""
    rows = results.compiled
    if not rows:
        return "Not compiled yet."
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for kernel, dtype in sorted({(row["kernel"], row["dtype"]) for row in rows}):
        own = [row for row in rows if (row["kernel"], row["dtype"]) == (kernel, dtype)]
        cells = [_compiled_cell([row for row in own if row["target"] == t]) for t in targets]
        lines.append([kernel, dtype, *cells])
    stacks = sum(int(row["stack"]) > 0 for row in rows)
    spills = f"{stacks} use a stack" if stacks else "none uses a stack: no register spills"
    said = (
        f"{len(rows)} compilations of {len({row['kernel'] for row in rows})} kernels for "
        f"{len(targets)} targets by Triton {' and '.join(sorted({r['triton'] for r in rows}))}; "
        f"{spills}. Of each kernel's configurations the most registers of a thread, the most "
        "shared memory of a program, and the tensor-core instruction with its fewest and most "
        f"occurrences. Each is in {results.link('compiled.csv')}."
    )
    worst = table(lines, ["kernel", "dtype", *targets], "l" * (2 + len(targets)))
    return joined([said, folded("Worst case of every kernel, target and dtype", worst)])


BLOCKS: dict[str, Callable[[Results], str]] = {
    "em": em,
    "conv": conv,
    "model": model,
    "post": post,
    "train-mem": train_mem,
    "eval": evaluation,
    "scale": scale,
    "roofline": roofline,
    "compiled": compiled,
}


def _suite(
    results: Results, suite: str, said: Callable[[Sequence[Row]], str] = lambda rows: ""
) -> str:
    """Every run of a suite: where it was made, its tables, and the lines said of its rows."""
    found = list(runs(results.files, suite))
    parts = []
    for name, rows in found:
        parts += run(results.link(name), rows)
        parts += [f"- {line}" for line in said(rows).splitlines()]
    if not found:
        return "Not measured yet."
    if not any(on_gpu(row) for _, rows in found for row in rows):
        parts.append(f"On a GPU: {NOT_MEASURED}.")
    return joined(parts)


def _published() -> Iterator[tuple[str, str, Published]]:
    """Network, mode of inference and published figures of each model."""
    for name, entry in ZOO.items():
        if entry.published:
            yield name.split("-")[0].removeprefix("emanet_"), entry.protocol.mode, entry.published


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
