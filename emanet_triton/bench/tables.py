"""Measured rows as Markdown: a table of times and one of memory for each run of a suite."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from tabulate import tabulate

from emanet_triton.bench.rows import PASSED, Row

LONG = 12  # cases from which a table is folded away
COLUMNS = {  # of a row, each a table of its own: its title
    "cold_ms": "median with a cold L2 cache, ms",
    "host_us": "host time of a call, µs",
    "peak_mb": "peak memory, MB",
}


def runs(files: Mapping[str, list[Row]], suite: str) -> Iterator[tuple[str, list[Row]]]:
    """The rows of a suite by file and by machine, in the files' order."""
    for name, rows in files.items():
        own = [row for row in rows if row.suite == suite]
        for machine in dict.fromkeys(map(_machine, own)):
            yield name, [row for row in own if _machine(row) == machine]


def _machine(row: Row) -> tuple:
    versions = row.driver, row.torch, row.triton, row.commit, row.date
    return row.device, row.threads, *versions, row.copy_gb_s, row.noise


def run(link: str, rows: Sequence[Row]) -> Iterator[str]:
    """Where a run was made, its times, its memory, and what is to be said of single providers."""
    cases = list(dict.fromkeys(row.case for row in rows))
    shown = [row.provider for row in rows if row.gate == PASSED]
    providers = list(dict.fromkeys(shown))
    by_key = {(row.case, row.provider): row for row in rows}
    yield f"{_where(rows)} ({link}):"
    found = [_times(cases, providers, by_key)]
    for column, title in COLUMNS.items():
        if any(getattr(row, column) is not None for row in rows):
            lines = [[c, *(_cell(by_key.get((c, p)), column) for p in providers)] for c in cases]
            found.append(table(lines, [title, *providers], "l" + "r" * len(providers)))
    for text in found:
        yield folded(f"{len(cases)} cases", text) if len(cases) > LONG else text
    yield from _others(rows)


def _where(rows: Sequence[Row]) -> str:
    """The machine of a run, its ceilings and its noise."""
    row = rows[0]
    parts = [row.device]
    if row.threads:
        parts.append(f"{row.threads} thread{'s' if row.threads > 1 else ''}")
    parts += [f"driver {row.driver}"] if row.driver else []
    parts += [f"PyTorch {row.torch}", *([f"Triton {row.triton}"] if row.triton else [])]
    parts.append(f"commit {row.commit}, {row.date}")
    rates = dict.fromkeys(
        f"{row.matmul_tflop_s:.3g} TFLOP/s ({row.dtype})" for row in rows if row.matmul_tflop_s
    )
    if row.copy_gb_s:
        parts.append(f"copy {row.copy_gb_s:.4g} GB/s, matmul {', '.join(rates)}")
    return "; ".join(parts) + (f"; noise {row.noise:.1%}" if row.noise is not None else "")


def _times(
    cases: Iterable[str], providers: Sequence[str], by_key: dict[tuple[str, str], Row]
) -> str:
    """A line for each case: every provider's median and ratio; floor and forecast apart."""
    lines = []
    for case in cases:
        own = [row for (name, _), row in by_key.items() if name == case]
        cells = [_time(by_key.get((case, provider))) for provider in providers]
        floor = next((f"{row.floor_ms:.3g}" for row in own if row.floor_ms), "")
        forecast = ", ".join(dict.fromkeys(row.predicted_ms for row in own if row.predicted_ms))
        lines.append([case, *cells, floor, forecast])
    columns = ["median, ms", *providers, "floor, ms", "predicted, ms"]
    kept = [i for i in range(len(columns)) if i <= len(providers) or any(line[i] for line in lines)]
    lines = [[line[i] for i in kept] for line in lines]
    return table(lines, [columns[i] for i in kept], "l" + "r" * (len(kept) - 1))


def _time(row: Row | None) -> str:
    """A median and how many times faster than the baseline, with the ratio's p20 to p80."""
    if row is None:
        return ""
    if row.p50_ms is None:
        return row.gate.partition(":")[0]
    if row.ratio is None or row.ratio == row.ratio_p20 == row.ratio_p80 == 1:
        return number(row.p50_ms)
    return f"{number(row.p50_ms)}, {row.ratio:.2f}× ({row.ratio_p20:.2f}–{row.ratio_p80:.2f})"


def _cell(row: Row | None, column: str) -> str:
    value = None if row is None else getattr(row, column)
    return "" if value is None else number(value)


def _others(rows: Sequence[Row]) -> Iterator[str]:
    """Providers without a time, with the reason; and those that no graph holds, beside graphs."""
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
        everywhere = len(cases) == total
        yield f"- {reason}" + ("" if everywhere else f" ({', '.join(cases)})")


def on_gpu(row: Row) -> bool:
    """Whether a row is of a GPU: those have no number of threads."""
    return row.threads is None


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(lines: Sequence[Sequence[str]], columns: Sequence[str], align: str) -> str:
    """In Markdown; ``align`` has an l or an r for each column."""
    sides = ["left" if letter == "l" else "right" for letter in align]
    return tabulate(lines, columns, "pipe", disable_numparse=True, colalign=sides)


def folded(title: str, text: str) -> str:
    """Text that a reader opens by its title."""
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def joined(parts: Iterable[str]) -> str:
    """Paragraphs; list items that follow each other stay together."""
    text = ""
    for part in filter(None, parts):
        both_items = part.startswith("- ") and text.rsplit("\n", 1)[-1].startswith("- ")
        text += (("\n" if both_items else "\n\n") if text else "") + part
    return text
