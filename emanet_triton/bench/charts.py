"""Charts of measured rows as SVG, for light and dark pages.

A chart's file holds a digest of its figures, so that ``report --check`` need not draw it. Drawing
needs matplotlib (the extra ``plot``).
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.bench.suites import SUITES
from emanet_triton.cores import in_words
from emanet_triton.errors import InputError
from emanet_triton.files import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CASES = 20  # of a ratio chart: those that take the longest
GREY = "#7d8590"  # legible on white and on black
COLORS = {"fp32": "#2f81f7", "bf16": "#e8730c", "fp16": "#2da44e", "int8": "#a371f7"}
MARKERS = "osD^vPX*p"  # of providers in a ratio chart, of suites in a roofline
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), GREY),
    **dict.fromkeys(("grid.color", "xtick.color", "ytick.color"), GREY),
    "svg.hashsalt": "emanet_triton",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        kind: "roofline", or the name of the suite whose ratios are shown.
        machine: the short name of the machine, a part of the file's name.
        title: the text above the chart.
        figures: all that is drawn: lists, dicts, texts and numbers.
    """

    kind: str
    machine: str
    title: str
    figures: Any

    @property
    def file(self) -> str:
        kind = self.kind if self.kind == "roofline" else f"ratios_{self.kind}"
        return f"{kind}_{self.machine}.svg"

    @property
    def digest(self) -> str:
        content = json.dumps([self.title, self.figures], sort_keys=True)
        return f"figures-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def digest_of(svg: str) -> str | None:
    """The digest in a file; none if the file was not drawn here."""
    found = re.search(r"figures-[0-9a-f]{16}", svg)
    return found[0] if found else None


def charts_of(rows: Sequence[Row]) -> list[Chart]:
    """The charts of rows of any suites and machines: for each machine a roofline, then ratios."""
    machines: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        if row.gate == PASSED:
            machines.setdefault((row.device, row.threads), []).append(row)
    return [
        chart
        for name, own in zip(_short_names(list(machines)), machines.values(), strict=True)
        for chart in (*_roofline(name, own), *_ratios(name, own))
    ]


def _short_names(machines: Sequence[tuple[str, int | None]]) -> Iterator[str]:
    """cpu2 for two threads, h200 for NVIDIA H200; with a number where two have one name."""
    seen: dict[str, int] = {}
    for device, threads in machines:
        last_word = device.rpartition(" ")[2].lower()
        name = f"cpu{threads}" if threads else re.sub(r"[^a-z0-9]+", "-", last_word)
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def _title(what: str, row: Row) -> str:
    threads = f", {in_words(row.threads)}" if row.threads else ""
    return f"{what}: {row.device}{threads}"


def _dtype(row: Row) -> str:
    """The dtype of a provider; some have it in their names."""
    suffix = row.provider.rpartition("-")[2]
    return suffix if suffix in COLORS else row.dtype


def _roofline(machine: str, rows: Sequence[Row]) -> Iterator[Chart]:
    """The baseline and the fastest other provider of each case that has a floor."""
    points: list[list[object]] = []  # suite, whether it is the baseline, dtype, FLOP/byte, TFLOP/s
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.gb_s and row.tflop_s:
            by_case.setdefault((row.suite, row.case), []).append(row)
    for own in by_case.values():
        baseline = [row for row in own if row.is_baseline]
        others = sorted((r for r in own if not r.is_baseline), key=lambda row: row.p50_ms or 0)
        for row in baseline[:1] + others[:1]:
            if row.gb_s and row.tflop_s:
                intensity = 1e3 * row.tflop_s / row.gb_s
                points.append([row.suite, row.is_baseline, _dtype(row), intensity, row.tflop_s])
    copies = [row.copy_gb_s for row in rows if row.copy_gb_s]
    rates: dict[str, float] = {}
    for row in rows:
        if row.matmul_tflop_s:
            rates[row.dtype] = max(row.matmul_tflop_s, rates.get(row.dtype, 0))
    if points and copies and rates:
        figures = {"points": points, "copy_gb_s": max(copies), "matmul_tflop_s": rates}
        yield Chart("roofline", machine, _title("Roofline", rows[0]), figures)


def _ratios(machine: str, rows: Sequence[Row]) -> Iterator[Chart]:
    """How many times faster than the baseline every provider of a suite is."""
    for suite in SUITES.values():
        own = [row for row in rows if row.suite == suite.name and suite.chart]
        longest = {row.case: row.p50_ms or 0 for row in own if row.is_baseline}
        kept = sorted(longest, key=lambda case: -longest[case])[:MOST_CASES]
        lines = [
            [_label(row.case), row.provider, _dtype(row), row.ratio_p20, row.ratio, row.ratio_p80]
            for row in own
            if row.case in kept and row.ratio and not row.is_baseline
        ]
        if lines:
            baseline = next(row.provider for row in own if row.is_baseline)
            what = f"{suite.name}, times faster than {baseline}"
            if len(kept) < len(longest):
                what += f" (the {len(kept)} longest of {len(longest)} cases)"
            yield Chart(suite.name, machine, _title(what, own[0]), lines)


def _label(case: str) -> str:
    """A case's name without how often the networks use it."""
    return re.sub(r" r\d+-\w+=\d+", "", case)


def has_matplotlib() -> bool:
    """Whether charts can be drawn here."""
    try:
        import matplotlib  # noqa: F401 (only whether it imports)
    except ImportError:
        return False
    return True


def require_matplotlib() -> None:
    """Raises InputError where charts cannot be drawn."""
    if not has_matplotlib():
        raise InputError("charts need matplotlib, which is not installed: pip install matplotlib")


def write_charts(charts: Sequence[Chart], folder: Path) -> None:
    """Draw charts into a folder.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be written.
    """
    require_matplotlib()
    for chart in charts:
        write_output(folder / chart.file, svg(chart), make_folder=True)


def svg(chart: Chart) -> bytes:
    """Draw a chart: the same bytes for the same figures and the same matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        (_draw_roofline if chart.kind == "roofline" else _draw_ratios)(figure, axes, chart.figures)
        axes.set_title(chart.title)
        out = io.BytesIO()
        metadata = {"Date": None, "Title": chart.title, "Description": chart.digest}
        figure.savefig(out, format="svg", metadata=metadata, bbox_inches="tight")
    return out.getvalue()


def _draw_roofline(figure: "Figure", axes: "Axes", figures: dict[str, Any]) -> None:
    figure.set_size_inches(6.5, 4.2)
    copy, rates, points = (figures[name] for name in ("copy_gb_s", "matmul_tflop_s", "points"))
    ridges = {dtype: 1e3 * rate / copy for dtype, rate in rates.items()}
    intensities = [*(point[3] for point in points), *ridges.values()]
    low, last, high = min(intensities) / 3, max(ridges.values()), 2 * max(intensities)
    suites = list(dict.fromkeys(point[0] for point in points))
    for suite, is_baseline, dtype, x, y in points:
        filling = "none" if is_baseline else COLORS.get(dtype, GREY)
        marker = MARKERS[suites.index(suite) % len(MARKERS)]
        color = COLORS.get(dtype, GREY)
        axes.plot([x], [y], marker, markersize=5, color=color, markerfacecolor=filling)
    for i, suite in enumerate(suites):
        for who, filling in (("baseline", "none"), ("fastest other", GREY)):
            marker, label = MARKERS[i % len(MARKERS)], f"{suite}, {who}"
            axes.plot([], [], marker, color=GREY, markerfacecolor=filling, label=label)
    ceiling = [low, last], [low * copy / 1e3, last * copy / 1e3]
    axes.plot(*ceiling, color=GREY, zorder=1, label=f"copy: {copy:.4g} GB/s")
    for dtype, rate in rates.items():
        label = f"matmul {dtype}: {rate:.3g} TFLOP/s"
        color = COLORS.get(dtype, GREY)
        axes.plot([ridges[dtype], high], [rate, rate], color=color, zorder=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="TFLOP/s")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_ratios(figure: "Figure", axes: "Axes", figures: list[list[Any]]) -> None:
    cases = list(dict.fromkeys(line[0] for line in figures))
    providers = list(dict.fromkeys(line[1] for line in figures))
    dtypes = {line[2] for line in figures}
    figure.set_size_inches(6.5, 1.2 + 0.3 * len(cases))
    for provider, dtype in dict.fromkeys((line[1], line[2]) for line in figures):
        own = [line for line in figures if (line[1], line[2]) == (provider, dtype)]
        spread = [line[4] - line[3] for line in own], [line[5] - line[4] for line in own]
        has_name = len(dtypes) == 1 or provider.endswith(dtype)
        axes.errorbar(
            [line[4] for line in own],
            [cases.index(line[0]) for line in own],
            xerr=spread,
            fmt=MARKERS[providers.index(provider) % len(MARKERS)],
            color=COLORS.get(dtype, GREY),
            label=provider if has_name else f"{provider}, {dtype}",
        )
    axes.axvline(1, color=GREY, linewidth=1.5)
    labels, shared = _short_labels(cases)
    axes.set(xscale="log", xlabel=shared)
    axes.set_yticks(range(len(cases)), labels)
    values = [1, *(value for line in figures for value in line[3:])]
    ticks = _ticks(min(values), max(values))
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(ticks[0], *values) / 1.1, max(ticks[-1], *values) * 1.1)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _short_labels(cases: Sequence[str]) -> tuple[list[str], str]:
    """The cases without the words that all of them have, and those words."""
    if len(cases) < 2:
        return list(cases), ""
    words = [case.split() for case in cases]
    shared = [word for word in words[0] if all(word in other for other in words)]
    labels = [" ".join(word for word in own if word not in shared) for own in words]
    return labels, f"all: {' '.join(shared)}" if shared else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios in and around a range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in (1, 1.5, 2, 3, 5)]
    return [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
