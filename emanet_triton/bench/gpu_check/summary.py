"""What a stage prints last: at most sixty lines."""

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.steps import LOG, Outcome
from emanet_triton.bench.rows import PASSED, Row, read_rows
from emanet_triton.errors import InputError

LINES, WIDTH = 60, 120  # at most
PARTS = 3  # lines that a long one is wrapped into, at most
WRONG, LAYERS, OTHERS, ABSENT = 6, 10, 6, 4  # entries of a kind, at most
NETWORKS = {  # providers of the suite model, as the table names them
    "plain-fp32": "plain fp32",
    "plain-bf16": "plain",
    "cudnn-bf16": "all cuDNN",
    "triton-bf16": "all Triton",
    "fused-fp32": "chosen fp32",
    "fused-bf16": "chosen",
}
# In a convolution's name: what most of the networks' have, and what follows from the rest.
USUAL = re.compile(r" (W=\d+|stride=1|dilation=1|B=1|bf16|uses=\d+|r\d+-\w+=\d+)(?= |$)")


def summarise(title: str, outcomes: Sequence[Outcome], notes: Iterable[str] = ()) -> str:
    """All that matters of the steps so far.

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
    """A line as lines of the width; none of an empty one."""
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
    """How many times as long as predicted, a range counting as its middle; empty if unknown."""
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
    """What was compiled ahead."""
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
    lines = []
    for outcome in outcomes:
        rows = rows_of(outcome.folder)
        gates = [row.gate for row in rows] or [f["gate"] for f in _findings(outcome)]
        passed = f"{sum(gate == PASSED for gate in gates)} of {len(gates)}" if gates else ""
        compiled = str(outcome.compiled or "")
        lines.append(
            [outcome.step.name, outcome.result, f"{outcome.seconds:.0f}", compiled, passed]
        )
    said = [
        f"  {outcome.step.name}: {line}"
        for outcome in outcomes
        if outcome.failed and (line := _last_line(outcome.folder / LOG))
    ]
    return [*_table(lines, ["step", "result", "s", "compiled", "passed"]), *said]


def _last_line(log: Path) -> str:
    """Of what a step has said; its first line is the command."""
    if not log.exists():
        return ""
    lines = [line for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()]
    return lines[-1].strip() if lines else ""


def _findings(outcome: Outcome) -> list[dict]:
    return own.read_json_lines(outcome.folder / own.CORRECT)


def _correct(outcomes: Sequence[Outcome]) -> list[str]:
    """Passed cases of every family, and the first failures of each."""
    found = [finding for outcome in outcomes for finding in _findings(outcome)]
    counts, wrong = [], []
    for family, group in itertools.groupby(
        sorted(found, key=lambda f: f["family"]), key=lambda f: f["family"]
    ):
        cases = list(group)
        passed = sum(case["gate"] == PASSED for case in cases)
        counts.append(f"{family} {passed} of {len(cases)}")
        failed = [case for case in cases if case["gate"].startswith("failed")]
        wrong += [f"  {family}: {f['case']}: {f['gate']}" for f in failed]
    if not counts:
        return []
    more = [f"  ... and {len(wrong) - WRONG} more in {own.CORRECT}"] if len(wrong) > WRONG else []
    return [f"correct: {', '.join(counts)}", *_spread(wrong)[:WRONG], *more]


def _spread(lines: list[str]) -> list[str]:
    """The first of every family before the second of any."""
    seen: dict[str, int] = {}
    ranked = []
    for line in lines:
        family = line.partition(":")[0]
        seen[family] = seen.get(family, 0) + 1
        ranked.append((seen[family], line))
    return [line for _, line in sorted(ranked, key=lambda pair: pair[0])]


def _wrong_rows(rows: Sequence[Row]) -> list[str]:
    wrong = [
        f"  {row.suite}: {row.case}: {row.provider} {row.gate}"
        for row in rows
        if row.gate.startswith("failed")
    ]
    more = [f"  ... and {len(wrong) - WRONG} rows more"] if len(wrong) > WRONG else []
    return [*(["rows that failed:"] if wrong else []), *wrong[:WRONG], *more]


def _networks(rows: Sequence[Row]) -> list[str]:
    """A line for each case: milliseconds of every provider, images a second, the forecast."""
    own_rows = [row for row in rows if row.suite == "model"]
    names = [name for name in NETWORKS if any(row.provider == name for row in own_rows)]
    lines = []
    for case in dict.fromkeys(row.case for row in own_rows):
        found = {row.provider: row for row in own_rows if row.case == case}
        best = found.get("fused-bf16")
        ms = best.p50_ms if best else None
        forecast = best.predicted_ms if best else ""
        rate = f"{1e3 / ms:.1f}" if ms else "-"
        times = [_ms(found[name].p50_ms if name in found else None) for name in names]
        lines.append([case, *times, rate, forecast, factor(ms, forecast)])
    columns = [*(NETWORKS[name] for name in names), "images/s", "predicted", "factor"]
    return _table(lines, ["network, ms", *columns])


def _layers(rows: Sequence[Row]) -> list[str]:
    """The convolutions that are furthest from their floors; without times those with forecasts."""
    own_rows = [row for row in rows if row.suite == "conv"]
    best: dict[str, Row] = {}
    for row in own_rows:
        if row.p50_ms and (row.case not in best or row.p50_ms < best[row.case].p50_ms):
            best[row.case] = row
    chosen = sorted(best.values(), key=lambda row: -(row.x_floor or 0))
    title = "furthest from the floor" if chosen else "convolutions with a forecast"
    chosen = chosen or [row for row in own_rows if row.predicted_ms]
    forecasts = {row.case: row.predicted_ms for row in own_rows if row.provider == "triton"}
    triton = {row.case: row.p50_ms for row in own_rows if row.provider == "triton"}
    lines = [
        [
            _short(row.case), row.provider if row.p50_ms else "-",
            _ms(row.p50_ms), _ms(row.cold_ms), _ms(row.floor_ms), _ms(row.x_floor),
            _ms(triton.get(row.case)), forecasts.get(row.case, ""),
            factor(triton.get(row.case), forecasts.get(row.case, "")),
        ]
        for row in chosen[:LAYERS]
    ]  # fmt: skip
    columns = ["fastest", "ms", "cold", "floor", "x floor", "Triton", "predicted", "factor"]
    return _table(lines, [title, *columns])


def _others(rows: Sequence[Row]) -> list[str]:
    """EM and labels by Triton."""
    chosen = [row for row in rows if row.suite in ("em", "post") and row.provider == "triton"]
    chosen.sort(key=lambda row: not row.predicted_ms)  # those with a forecast first
    lines = [
        [
            f"{row.suite} {row.case}", _ms(row.p50_ms), _ms(row.cold_ms), _ms(row.ratio),
            row.predicted_ms, factor(row.p50_ms, row.predicted_ms),
        ]
        for row in chosen[:OTHERS]
    ]  # fmt: skip
    return _table(lines, ["by Triton", "ms", "cold", "times faster", "predicted", "factor"])


def _sweep(rows: Sequence[Row]) -> list[str]:
    """The shipped and the best tile of every shape."""
    swept = [row for row in rows if row.suite == own.SWEEP_SUITE]
    lines = []
    for case in dict.fromkeys(row.case for row in swept):
        found = [row for row in swept if row.case == case]
        shipped = next(row for row in found if row.provider.endswith(own.SHIPPED))
        best = min((row for row in found if row.p50_ms), key=lambda row: row.p50_ms, default=None)
        cells = [shipped.provider.removesuffix(own.SHIPPED), _ms(shipped.p50_ms)]
        cells += [
            best.provider.removesuffix(own.SHIPPED) if best else "-",
            _ms(best and best.p50_ms),
        ]
        lines.append([_short(case), *cells, _ms(best and best.x_floor)])
    columns = ["shipped tile", "ms", "best tile", "ms", "x floor"]
    return _table(lines, [f"sweep of {len(swept)} tiles", *columns])


def _host(rows: Sequence[Row]) -> list[str]:
    """The operators of Triton that take the host longest."""
    hosted = [row for row in rows if row.suite != "model" and row.provider == "triton"]
    hosted = [row for row in hosted if row.host_us]
    hosted.sort(key=lambda row: -row.host_us)
    lines = [[f"{row.suite} {_short(row.case)}", _ms(row.host_us)] for row in hosted[:LAYERS]]
    return _table(lines, ["eager calls by Triton", "host us"])


def _absent(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> list[str]:
    """What did not run, with the reason, each reason once."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    each = [("steps", outcome.step.name, outcome.result) for outcome in outcomes]
    each += [("providers", row.provider, row.gate) for row in rows if row.suite != own.SWEEP_SUITE]
    for kind, name, result in each:
        if result.startswith("absent: "):
            kinds = found.setdefault(result.removeprefix("absent: "), {})
            kinds.setdefault(kind, {})[name] = None
    lines = []
    for reason, kinds in found.items():
        said = "; ".join(f"{kind} {', '.join(names)}" for kind, names in kinds.items())
        lines.append(f"absent ({reason}): {said}")
    return lines[:ABSENT]


def _table(lines: list[list[str]], columns: list[str]) -> list[str]:
    if not lines:
        return []
    lines = [columns, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short(case: str) -> str:
    """The name of a convolution without what most convolutions of the networks have."""
    return USUAL.sub("", case)
