"""The charts that measured rows give: what is drawn, and from which figures."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.bench.suites.scale import pixels, series

RATIO_SUITES = ("em", "conv", "model", "post")
MOST_CASES = 20  # of a ratio chart: those that take the longest


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        kind: "roofline", "scale" or "ratios_SUITE".
        machine: short name, part of the file's.
        title: said above it.
        figures: all that is drawn, of plain lists, dicts, text and numbers.
    """

    kind: str
    machine: str
    title: str
    figures: Any

    @property
    def name(self) -> str:
        """Of its file, without the suffix."""
        return f"{self.kind}_{self.machine}"

    @property
    def digest(self) -> str:
        """Stands in the file, and says which figures it was drawn from."""
        content = json.dumps([self.title, self.figures], sort_keys=True)
        return f"figures-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def charts_of(rows: Sequence[Row]) -> list[Chart]:
    """The charts that rows of any suites and machines give, a roofline for each machine first."""
    machines: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.gate == PASSED:
            machines.setdefault((row.device, row.threads), []).append(row)
    return [
        chart
        for name, own in zip(_short_names(list(machines)), machines.values(), strict=True)
        for make in (_roofline, _ratios, _scale)
        for chart in make(name, own)
    ]


def digest_of(svg: str) -> str | None:
    """The digest that a file drawn here holds."""
    found = re.search(r"figures-[0-9a-f]{16}", svg)
    return found[0] if found else None


def _short_names(machines: Sequence[tuple[str, int | None]]) -> Iterator[str]:
    """cpu2 for two threads, h200 for NVIDIA H200; a number where two have one name."""
    seen: dict[str, int] = {}
    for device, threads in machines:
        last_word = device.rpartition(" ")[2].lower()
        name = f"cpu{threads}" if threads else re.sub(r"[^a-z0-9]+", "-", last_word)
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def _title(what: str, row: Row) -> str:
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.threads else ""
    return f"{what}: {row.device}{threads}"


def _roofline(machine: str, rows: Sequence[Row]) -> Iterator[Chart]:
    """The baseline and the fastest of the others at each case that has a floor, by suite."""
    points: dict[str, list[list[float]]] = {}
    for case in dict.fromkeys((row.suite, row.case) for row in rows):
        own = [r for r in rows if (r.suite, r.case) == case and r.gb_s and r.tflop_s]
        others = sorted((r for r in own if not _is_baseline(r)), key=lambda row: row.p50_ms)
        for who, found in (("baseline", filter(_is_baseline, own)), ("fastest other", others)):
            for row in list(found)[:1]:
                label = f"{row.suite}, {who}"
                point = [1e3 * row.tflop_s / row.gb_s, row.tflop_s]
                points.setdefault(label, []).append(point)
    copies = [row.copy_gb_s for row in rows if row.copy_gb_s]
    rates = {row.dtype: row.matmul_tflop_s for row in rows if row.matmul_tflop_s}
    if points and copies and rates:
        figures = {"points": points, "copy_gb_s": max(copies), "matmul_tflop_s": rates}
        yield Chart("roofline", machine, _title("Roofline", rows[0]), figures)


def _ratios(machine: str, rows: Sequence[Row]) -> Iterator[Chart]:
    for suite in RATIO_SUITES:
        own = [row for row in rows if row.suite == suite]
        longest = {row.case: row.p50_ms for row in own if _is_baseline(row)}
        kept = sorted(longest, key=lambda case: -longest[case])[:MOST_CASES]
        names = [case for case in longest if case in kept]
        lines = [
            [_label(row.case), row.provider, row.ratio_p20, row.ratio, row.ratio_p80]
            for row in own
            if row.case in names and row.ratio and not _is_baseline(row)
        ]
        if lines:
            what = f"{suite}, times faster than {_baseline_of(own)}"
            what += f" (the {len(names)} longest of {len(longest)} cases)" * (
                len(names) < len(longest)
            )
            yield Chart(f"ratios_{suite}", machine, _title(what, own[0]), lines)


def _scale(machine: str, rows: Sequence[Row]) -> Iterator[Chart]:
    own = [row for row in rows if row.suite == "scale"]
    lines = []
    for column, label in (("p50_ms", "time, ms"), ("peak_mb", "peak memory, MB")):
        for (what, provider), found in series(own).items():
            points = [[pixels(r.case), v] for r in found if (v := getattr(r, column))]
            if points:
                lines.append([label, what, provider, points])
    if lines:
        yield Chart("scale", machine, _title("Against image size", own[0]), lines)


def _label(case: str) -> str:
    """A case's name without how often the networks use it."""
    return re.sub(r" r\d+-\w+=\d+", "", case)


def _is_baseline(row: Row) -> bool:
    return row.ratio == row.ratio_p20 == row.ratio_p80 == 1


def _baseline_of(rows: Sequence[Row]) -> str:
    return next((row.provider for row in rows if _is_baseline(row)), "the baseline")
