"""The text that a stage prints last: at most sixty lines."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.steps import LOG, Outcome
from emanet_triton.bench.rows import PASSED, Row, read_rows
from emanet_triton.errors import InputError

LINES, WIDTH = 60, 120  # at most
PARTS = 3  # a long line is wrapped into so many lines at most
WRONG, LAYERS, OTHERS, ABSENT = 6, 10, 8, 4  # entries of a kind, at most
NETWORKS = {  # providers of the suite model, as the table names them
    "plain-fp32": "plain fp32",
    "plain-bf16": "plain",
    "cudnn-bf16": "all cuDNN",
    "triton-bf16": "all Triton",
    "fused-fp32": "chosen fp32",
    "fused-bf16": "chosen",
    "fastest-bf16": "with Gluon",
}
# In a convolution's name: what most of the networks' have, and what follows from the rest.
USUAL = re.compile(r" (W=\d+|stride=1|dilation=1|B=1|bf16|uses=\d+|r\d+-\w+=\d+)(?= |$)")


def summarise(title: str, outcomes: Sequence[Outcome], notes: Iterable[str] = ()) -> str:
    """The findings of the steps so far.

    Args:
        title: the first line.
        outcomes: of the steps.
        notes: lines about the stage as a whole.
    """
    rows = [row for outcome in outcomes for row in rows_of(outcome.folder)]
    lines = [title, _versions(outcomes), *_warm(outcomes), *notes]
    lines += _steps(outcomes)
    lines += _correct(outcomes)
    lines += _wrong_rows(rows)
    lines += _networks(rows)
    lines += _layers(rows)
    lines += _others(rows)
    lines += _sweep(rows)
    lines += _host(rows)
    lines += _absent(outcomes, rows)
    lines = [part for line in lines for part in _wrapped(line)]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more"]
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    """A line as lines of at most ``WIDTH`` characters; no line for an empty one."""
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent="    ",
        max_lines=PARTS,
        placeholder=" ...",
        break_on_hyphens=False,
    )


def rows_of(folder: Path) -> list[Row]:
    """The rows that the suites have written into a folder."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            found += read_rows(path)
        except InputError:  # another table
            continue
    return found


def factor(milliseconds: float | None, predicted: str) -> str:
    """The time over the middle of the predicted range; empty if one is unknown."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", predicted)]
    if milliseconds is None or not numbers:
        return ""
    return f"{milliseconds / (sum(numbers) / len(numbers)):.2f}x"


def _versions(outcomes: Sequence[Outcome]) -> str:
    """Versions, and the state of the GPU before and after."""
    found = [v for outcome in outcomes if (v := own.read_json(outcome.folder / own.VERSIONS))]
    if not found:
        return ""
    names = "gpu", "driver", "torch", "triton", "cudnn", "numpy", "python", "commit"
    said = ", ".join(f"{name} {found[0].get(name, '')}" for name in names)
    states = (each["nvidia-smi"] for each in found if isinstance(each["nvidia-smi"], dict))
    wanted = "clocks.sm", "power.draw", "temperature.gpu", "memory.free"
    values = (" ".join(str(state.get(name)) for name in wanted) for state in states)
    return said + "".join(f"; {value}" for value in values)


def _warm(outcomes: Sequence[Outcome]) -> list[str]:
    """How many kernels were compiled ahead, and which do not compile."""
    for outcome in outcomes:
        warm = own.read_json(outcome.folder / own.WARM)
        if warm:
            failed = warm["failed"]
            said = (
                f"warm, {warm['arch']}: {warm['planned']} launches planned, {warm['distinct']} "
                f"kernels: {warm['hits']} hits, {warm['compiled']} compiled, {len(failed)} failed, "
                f"in {warm['seconds']:.0f} s"
            )
            launchers = f"; launchers: {warm['launchers']}" if warm["launchers"] else ""
            return [said + launchers, *(f"  {line}" for line in failed[:3])]
    return []


def _steps(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each step, and the last words of those that failed."""
    lines, said = [], []
    for outcome in outcomes:
        name, rows = outcome.step.name, rows_of(outcome.folder)
        gates = [row.gate for row in rows] or [f["gate"] for f in _findings(outcome)]
        passed = f"{gates.count(PASSED)} of {len(gates)}" if gates else ""
        compiled = str(outcome.compiled or "")
        lines.append([name, outcome.result, f"{outcome.seconds:.0f}", compiled, passed])
        if outcome.failed and (words := _last_line(outcome.folder / LOG)):
            said.append(f"  {name}: {words}")
    return [*_table(["step", "result", "s", "compiled", "passed"], lines), *said]


def _last_line(log: Path) -> str:
    """The last words of a step; the first line of its log is the command."""
    if not log.exists():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()]
    return lines[-1].strip() if lines else ""


def _findings(outcome: Outcome) -> list[dict[str, Any]]:
    return own.read_json_lines(outcome.folder / own.CORRECT)


def _correct(outcomes: Sequence[Outcome]) -> list[str]:
    """How many cases of each family passed, and the first failures of each."""
    found = [finding for outcome in outcomes for finding in _findings(outcome)]
    found.sort(key=lambda finding: finding["family"])
    counts, ranked = [], []
    for family, group in itertools.groupby(found, key=lambda finding: finding["family"]):
        cases = list(group)
        passed = sum(case["gate"] == PASSED for case in cases)
        counts.append(f"{family} {passed} of {len(cases)}")
        failed = (case for case in cases if case["gate"].startswith("failed"))
        ranked += [(n, f"  {family}: {f['case']}: {f['gate']}") for n, f in enumerate(failed)]
    ranked.sort(key=lambda pair: pair[0])  # the first of every family before the second of any
    wrong = _first([line for _, line in ranked], f"more in {own.CORRECT}")
    return [f"correct: {', '.join(counts)}", *wrong] if counts else []


def _wrong_rows(rows: Sequence[Row]) -> list[str]:
    wrong = [
        f"  {row.suite}: {row.case}: {row.provider} {row.gate}"
        for row in rows
        if row.gate.startswith("failed")
    ]
    return ["rows that failed:", *_first(wrong, "rows more")] if wrong else []


def _first(lines: list[str], more: str) -> list[str]:
    """The first lines, and how many there are beside them."""
    left = len(lines) - WRONG
    return [*lines[:WRONG], *([f"  ... and {left} {more}"] if left > 0 else [])]


def _networks(rows: Sequence[Row]) -> list[str]:
    """A line for each case: milliseconds of every provider, images a second, the forecast."""
    own_rows = [row for row in rows if row.suite == "model"]
    names = [name for name in NETWORKS if any(row.provider == name for row in own_rows)]
    lines = []
    for case in dict.fromkeys(row.case for row in own_rows):
        found = {row.provider: row for row in own_rows if row.case == case}
        times = {name: row.p50_ms for name, row in found.items()}
        ms = times.get("fused-bf16")
        forecast = found["fused-bf16"].predicted_ms if "fused-bf16" in found else ""
        rate = f"{1e3 / ms:.1f}" if ms else "-"
        cells = [_text(times.get(name)) for name in names]
        lines.append([case, *cells, rate, forecast, factor(ms, forecast)])
    columns = [*(NETWORKS[name] for name in names), "images/s", "predicted", "factor"]
    return _table(["network, ms", *columns], lines)


def _layers(rows: Sequence[Row]) -> list[str]:
    """The convolutions furthest from their floors; without times the ones with forecasts."""
    own_rows = [row for row in rows if row.suite == "conv"]
    best: dict[str, Row] = {}
    for row in sorted(own_rows, key=_milliseconds):
        if row.p50_ms:
            best.setdefault(row.case, row)
    chosen = sorted(best.values(), key=lambda row: -(row.x_floor or 0))
    title = "furthest from the floor" if chosen else "convolutions with a forecast"
    chosen = chosen or [row for row in own_rows if row.predicted_ms]
    triton = {row.case: row for row in own_rows if row.provider == "triton"}
    lines = []
    for row in chosen[:LAYERS]:
        ours = triton.get(row.case)
        ms, forecast = (ours.p50_ms, ours.predicted_ms) if ours else (None, "")
        times = [row.p50_ms, row.cold_ms, row.floor_ms, row.x_floor, ms]
        name = row.provider if row.p50_ms else "-"
        cells = [name, *map(_text, times), forecast, factor(ms, forecast)]
        lines.append([_short(row.case), *cells])
    columns = ["fastest", "ms", "cold", "floor", "x floor", "Triton", "predicted", "factor"]
    return _table([title, *columns], lines)


def _others(rows: Sequence[Row]) -> list[str]:
    """The EM operators and labels by Triton, and by other kernels that have a forecast."""
    own_rows = [row for row in rows if row.suite in ("em", "post")]
    chosen = [row for row in own_rows if row.provider == "triton" or row.predicted_ms]
    chosen.sort(key=lambda row: not row.predicted_ms)  # those with a forecast first
    lines = []
    for row in chosen[:OTHERS]:
        times = map(_text, (row.p50_ms, row.cold_ms, row.ratio))
        forecast = [row.predicted_ms, factor(row.p50_ms, row.predicted_ms)]
        other = "" if row.provider == "triton" else f", {row.provider}"
        lines.append([f"{row.suite} {row.case}{other}", *times, *forecast])
    return _table(["by Triton", "ms", "cold", "times faster", "predicted", "factor"], lines)


def _sweep(rows: Sequence[Row]) -> list[str]:
    """The shipped and the best tile of every shape."""
    swept = [row for row in rows if row.suite == own.SWEEP_SUITE]
    lines = []
    for case in dict.fromkeys(row.case for row in swept):
        found = [row for row in swept if row.case == case]
        shipped = next(row for row in found if row.provider.endswith(own.SHIPPED))
        best = min(found, key=_milliseconds)
        name = best.provider.removesuffix(own.SHIPPED) if best.p50_ms else "-"
        cells = [shipped.provider.removesuffix(own.SHIPPED), _text(shipped.p50_ms)]
        lines.append([_short(case), *cells, name, _text(best.p50_ms), _text(best.x_floor)])
    columns = ["shipped tile", "ms", "best tile", "ms", "x floor"]
    return _table([f"sweep of {len(swept)} tiles", *columns], lines)


def _host(rows: Sequence[Row]) -> list[str]:
    """The operators by Triton that take the host longest."""
    found = [(row.host_us or 0, row) for row in rows if row.suite != "model"]
    found = [(us, row) for us, row in found if us and row.provider == "triton"]
    found.sort(key=lambda pair: -pair[0])
    lines = [[f"{row.suite} {_short(row.case)}", _text(us)] for us, row in found[:LAYERS]]
    return _table(["eager calls by Triton", "host us"], lines)


def _absent(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> list[str]:
    """The steps and providers that did not run, by the reason."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    each = [("steps", outcome.step.name, outcome.result) for outcome in outcomes]
    each += [("providers", r.provider, r.gate) for r in rows if r.suite != own.SWEEP_SUITE]
    for kind, name, result in each:
        if result.startswith("absent: "):
            kinds = found.setdefault(result.removeprefix("absent: "), {})
            kinds.setdefault(kind, {})[name] = None
    lines = []
    for reason, kinds in found.items():
        said = "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items())
        lines.append(f"absent ({reason}): {said}")
    return lines[:ABSENT]


def _table(columns: list[str], lines: list[list[str]]) -> list[str]:
    """The lines of a table; no line if only its head is there."""
    cells = [columns, *lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    found = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return found if lines else []


def _milliseconds(row: Row) -> float:
    """For sorting: rows without a time come last."""
    return row.p50_ms or float("inf")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(case: str) -> str:
    """The name of a convolution without what most convolutions of the networks have."""
    return USUAL.sub("", case)
