"""Markdown from the measured rows of one suite: a table of times for each run, and more."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tabulate import tabulate

from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.bench.suite import Said
from emanet_triton.cores import in_words

NOT_MEASURED = "not measured"
LONG = 12  # a table of more cases is folded away
COLUMNS = {  # columns of rows that get a table of their own, and its title
    "cold_ms": "median with a cold L2 cache, ms",
    "host_us": "host time of a call, µs",
    "peak_mb": "peak memory, MB",
}


def suite_tables(link: str, rows: Sequence[Row], said: Said) -> Iterator[str]:
    """Every run of a suite as paragraphs: the machine, the tables, and lines about the rows.

    Args:
        link: a link to the file of the rows.
        rows: the rows of a suite in one file.
        said: says lines about the rows of one run.
    """
    for machine in dict.fromkeys(map(_machine, rows)):
        own = [row for row in rows if _machine(row) == machine]
        yield f"{_where(own)} ({link}):"
        yield from _run_tables(own)
        yield "\n".join(f"- {line}" for line in [*_without_time(own), *said(own).splitlines()])


def on_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU. Only rows of a CPU have a number of threads."""
    return row.threads is None


def number(value: float) -> str:
    """A number with three significant digits, or with all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(lines: Sequence[Sequence[str]], columns: Sequence[str], texts: int = 1) -> str:
    """A Markdown table. The first ``texts`` columns are aligned left, the others right."""
    sides = ["left" if i < texts else "right" for i in range(len(columns))]
    return tabulate(lines, columns, "pipe", disable_numparse=True, colalign=sides)


def folded(title: str, text: str) -> str:
    """Text that a reader opens by its title."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def paragraphs(parts: Iterable[str]) -> str:
    """The parts that are not empty, with empty lines between them."""
    return "\n\n".join(filter(None, parts))


def _machine(row: Row) -> tuple[object, ...]:
    versions = row.driver, row.torch, row.triton, row.runtimes, row.commit, row.date
    return row.device, row.threads, *versions, row.copy_gb_s, row.noise


def _where(rows: Sequence[Row]) -> str:
    """The machine of a run, its versions, its ceilings and its noise."""
    row = rows[0]
    rates = dict.fromkeys(
        f"{row.matmul_tflop_s:.3g} TFLOP/s ({row.dtype})" for row in rows if row.matmul_tflop_s
    )
    parts = [
        row.device,
        in_words(row.threads) if row.threads else "",
        f"driver {row.driver}" if row.driver else "",
        f"PyTorch {row.torch}",
        f"Triton {row.triton}" if row.triton else "",
        row.runtimes,
        f"commit {row.commit}, {row.date}",
        f"copy {row.copy_gb_s:.4g} GB/s, matmul {', '.join(rates)}" if row.copy_gb_s else "",
        "" if row.noise is None else f"noise {row.noise:.1%}",
    ]
    return "; ".join(filter(None, parts))


def _run_tables(rows: Sequence[Row]) -> Iterator[str]:
    cases = list(dict.fromkeys(row.case for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows if row.gate == PASSED))
    by_key = {(row.case, row.provider): row for row in rows}
    found = [_times(cases, providers, by_key)]
    for column, title in COLUMNS.items():
        if any(getattr(row, column) is not None for row in rows):
            lines = [[c, *(_cell(by_key.get((c, p)), column) for p in providers)] for c in cases]
            found.append(table(lines, [title, *providers]))
    for text in found:
        yield folded(f"{len(cases)} cases", text) if len(cases) > LONG else text


def _times(
    cases: Iterable[str], providers: Sequence[str], by_key: Mapping[tuple[str, str], Row]
) -> str:
    """A line for each case: median and ratio of every provider, then the floor and a forecast."""
    lines = []
    for case in cases:
        own = [row for (name, _), row in by_key.items() if name == case]
        cells = [_time(by_key.get((case, provider))) for provider in providers]
        floor = next((f"{row.floor_ms:.3g}" for row in own if row.floor_ms), "")
        forecast = ", ".join(dict.fromkeys(row.predicted_ms for row in own if row.predicted_ms))
        lines.append([case, *cells, floor, forecast])
    columns = ["median, ms", *providers, "floor, ms", "predicted, ms"]
    kept = [i for i in range(len(columns)) if i <= len(providers) or any(line[i] for line in lines)]
    return table([[line[i] for i in kept] for line in lines], [columns[i] for i in kept])


def _time(row: Row | None) -> str:
    """A median, and how many times faster it is than the baseline, with the ratio's spread."""
    if row is None:
        return ""
    if row.p50_ms is None:
        return row.gate.partition(":")[0]
    if row.ratio is None or row.is_baseline:
        return number(row.p50_ms)
    return f"{number(row.p50_ms)}, {row.ratio:.2f}× ({row.ratio_p20:.2f}–{row.ratio_p80:.2f})"


def _cell(row: Row | None, column: str) -> str:
    value = None if row is None else getattr(row, column)
    return "" if value is None else number(value)


def _without_time(rows: Sequence[Row]) -> Iterator[str]:
    """Providers without a time, and those that no CUDA graph holds, each with its reason."""
    graphs = any(row.clock == "graph" for row in rows)
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.gate != PASSED:
            by_reason.setdefault(f"{row.provider} {row.gate}", []).append(row.case)
        elif graphs and row.clock == "events":
            reason = f"{row.provider} cannot be captured: its launches are timed"
            by_reason.setdefault(reason, []).append(row.case)
    total = len({row.case for row in rows})
    for reason, cases in by_reason.items():
        yield reason if len(cases) == total else f"{reason} ({', '.join(cases)})"
