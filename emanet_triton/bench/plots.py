"""Charts as SVG, for light and dark pages. Drawing needs matplotlib (the extra ``plot``)."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emanet_triton.bench.charts import Chart, charts_of
from emanet_triton.bench.growth import FEWEST_POINTS, fit
from emanet_triton.bench.rows import Row
from emanet_triton.errors import InputError
from emanet_triton.files import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "#7d8590"  # legible on white and on black
COLORS = ("#2f81f7", "#e8730c", "#2da44e", "#bf4b8a", "#8957e5", "#b08800", "#1b9e9e", "#d1242f")
MARKERS = "osD^v"
STYLE = {
    "svg.hashsalt": "emanet_triton",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "savefig.transparent": True,
}


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


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """Draw the charts of rows into a folder.

    Raises:
        InputError: matplotlib is not installed, or a file cannot be written.
    """
    require_matplotlib()
    for chart in charts_of(rows):
        write_output(folder / f"{chart.name}.svg", svg(chart), make_folder=True)


def svg(chart: Chart) -> bytes:
    """Draw a chart: the same bytes for the same figures and the same matplotlib."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        out = io.BytesIO()
        metadata = {"Date": None, "Title": chart.title, "Description": chart.digest}
        figure = DRAW[chart.kind.partition("_")[0]](chart)
        figure.savefig(out, format="svg", metadata=metadata, bbox_inches="tight")
    return out.getvalue()


def _draw_roofline(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2))
    axes = figure.subplots()
    axes.margins(y=0.1)
    copy, rates = chart.figures["copy_gb_s"], chart.figures["matmul_tflop_s"]
    points = chart.figures["points"]
    intensities = [x for found in points.values() for x, _ in found]
    ridges = {dtype: 1e3 * rate / copy for dtype, rate in rates.items()}
    low = min(*intensities, min(ridges.values()) / 4) / 2
    high = 2 * max(*intensities, 2 * max(ridges.values()))
    for dtype, rate in rates.items():
        roof = [low, ridges[dtype], high], [low * copy / 1e3, rate, rate]
        axes.plot(*roof, color=TEXT, linewidth=1.5, zorder=1)
        note = f"matmul {dtype}: {rate:.3g} TFLOP/s"
        axes.annotate(note, (high, rate), (0, 3), textcoords="offset points", ha="right")
    note, start = f"copy: {copy:.4g} GB/s", (low, low * copy / 1e3)
    axes.annotate(note, start, (10, 0), textcoords="offset points", ha="left", va="center")
    suites = list(dict.fromkeys(label.partition(",")[0] for label in points))
    for label, found in points.items():
        marker = MARKERS[suites.index(label.partition(",")[0]) % len(MARKERS)]
        color = COLORS[1] if label.endswith("baseline") else COLORS[0]
        x, y = zip(*found, strict=True)
        axes.plot(x, y, marker, color=color, markersize=5, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte, each the least that is needed")
    axes.set(ylabel="TFLOP/s", title=chart.title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_ratios(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(line[0] for line in chart.figures))
    providers = list(dict.fromkeys(line[1] for line in chart.figures))
    figure = Figure(figsize=(6.5, 1.2 + 0.3 * len(cases)))
    axes = figure.subplots()
    for i, provider in enumerate(providers):
        own = [line for line in chart.figures if line[1] == provider]
        middle = [line[3] for line in own]
        spread = [line[3] - line[2] for line in own], [line[4] - line[3] for line in own]
        heights = [cases.index(line[0]) for line in own]
        look = {"color": COLORS[i % len(COLORS)], "fmt": MARKERS[i % len(MARKERS)]}
        axes.errorbar(middle, heights, xerr=spread, markersize=6, label=provider, **look)
    axes.axvline(1, color=TEXT, linewidth=1.5)
    labels, shared = _short_labels(cases)
    axes.set(xscale="log", xlabel=shared, title=chart.title)
    axes.set_yticks(range(len(cases)), labels)
    values = [1, *(value for line in chart.figures for value in line[2:])]
    ticks = _ticks(min(values), max(values))
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(ticks[0], *values) / 1.1, max(ticks[-1], *values) * 1.1)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


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


def _draw_scale(chart: Chart) -> "Figure":
    from matplotlib.figure import Figure

    quantities = list(dict.fromkeys(line[0] for line in chart.figures))
    keys = list(dict.fromkeys((line[1], line[2]) for line in chart.figures))
    figure = Figure(figsize=(4.2 * len(quantities), 3.6), layout="constrained")
    figure.suptitle(chart.title, fontsize=11)
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        for label, what, provider, points in chart.figures:
            if label == quantity:
                x, y = zip(*sorted(points), strict=True)
                i = keys.index((what, provider))
                grown = f": pixels^{fit(x, y).exponent:.2f}" if _fits(x) else ""
                look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
                axes.plot(x, y, label=f"{what}, {provider}{grown}", **look)
        axes.set(xscale="log", yscale="log", xlabel="10⁶ pixels", ylabel=quantity)
        sizes = sorted({x for *_, points in chart.figures for x, _ in points})
        axes.set_xticks(sizes, [f"{size / 1e6:.2g}" for size in sizes])
        axes.set_xticks([], minor=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def _fits(sizes: Sequence[float]) -> bool:
    return len(set(sizes)) >= FEWEST_POINTS


DRAW: dict[str, Callable[[Chart], "Figure"]] = {
    "roofline": _draw_roofline,
    "ratios": _draw_ratios,
    "scale": _draw_scale,
}
