"""The rows that every suite writes, and their files."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from emanet_triton.errors import InputError
from emanet_triton.files import write_whole

PASSED = "passed"


@dataclass(frozen=True)
class Row:
    """One provider at one case. ``None`` is what was not measured or does not apply.

    Attributes:
        suite, case: what was run; together the key that joins the rows of different runs.
        provider: who ran it.
        gate: ``"passed"``, ``"absent: why"`` or ``"failed: why"``; only the first has times.
        error, bound: of the result against the suite's reference, and the largest that passes.
        p20_ms, p50_ms, p80_ms, rounds: of the times of one call. On a GPU its L2 cache is warm.
        cold_ms: median time of one call on a GPU whose L2 cache has just been written over.
        host_us: microseconds that the host needs to launch one call on a GPU without a graph.
        clock: ``"graph"``, the replay of a CUDA graph; ``"events"``, launches of a call that
            cannot be captured; or ``"wall"``, wall clock.
        ratio, ratio_p20, ratio_p80: how many times faster than the baseline of the same round,
            median and spread.
        peak_mb: peak memory in 10^6 bytes, above what was there before the provider was made.
        floor_ms: the least that the machine's two ceilings allow.
        x_floor: p50 over that floor.
        gb_s, tflop_s: what the floor's bytes and FLOPs come to in p50.
        predicted_ms: a forecast made before anything was measured; nothing is computed from it.
        device, threads, dtype, driver, torch, triton, commit, date: where, with what and when.
        copy_gb_s, matmul_tflop_s: the ceilings, measured in the same run.
        noise: (p80 - p20) / p50 of a fixed workload in the same run.
    """

    suite: str
    case: str
    provider: str
    gate: str
    error: float | None = None
    bound: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    cold_ms: float | None = None
    host_us: float | None = None
    clock: str = ""
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    peak_mb: float | None = None
    floor_ms: float | None = None
    x_floor: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    predicted_ms: str = ""
    device: str = ""
    threads: int | None = None
    dtype: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    copy_gb_s: float | None = None
    matmul_tflop_s: float | None = None
    noise: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))
_WHOLE = {"rounds", "threads"}
_TEXT = {field.name for field in fields(Row) if field.type is str}
_DIGITS = 5


def check_writable(path: Path) -> None:
    """Make the file and its folder where they are missing; what is in it stays.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to five significant digits, making the folder where it is missing.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(value) for value in asdict(row).values()] for row in rows)
    _write(path, text.getvalue())


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write rows unrounded, as a list of objects; a value that was not measured is null.

    Raises:
        InputError: the file cannot be written.
    """
    _write(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole text or none of it: a run that is killed leaves the rows of its last write."""
    check_writable(path)
    if not path.is_file():  # such as /dev/stdout
        path.write_text(text)
        return
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_csv`` or, by the suffix .json, ``write_json`` wrote.

    Raises:
        InputError: a file that cannot be read or is not such a file; it names the line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path}: cannot be read: {reason}") from None
    return _from_json(path, text) if path.suffix == ".json" else _from_csv(path, text)


def _from_csv(path: Path, text: str) -> list[Row]:
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    if header != list(COLUMNS):
        raise InputError(f"{path}, line 1: expected the columns {','.join(COLUMNS)}")
    rows = []
    for values in reader:
        where = f"{path}, line {reader.line_num}"
        if len(values) != len(COLUMNS):
            raise InputError(f"{where}: expected {len(COLUMNS)} values, got {len(values)}")
        rows.append(_row(where, values))
    return rows


def _from_json(path: Path, text: str) -> list[Row]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of rows")
    rows = []
    for number, item in enumerate(content, 1):
        where = f"{path}, row {number}"
        if not isinstance(item, dict) or list(item) != list(COLUMNS):
            raise InputError(f"{where}: expected an object of {', '.join(COLUMNS)}")
        rows.append(_row(where, ["" if value is None else value for value in item.values()]))
    return rows


def _row(where: str, values: Sequence[object]) -> Row:
    return Row(*(_value(where, *pair) for pair in zip(COLUMNS, values, strict=True)))


def _value(where: str, column: str, value: object) -> str | float | int | None:
    if column in _TEXT:
        return str(value)
    if value == "":
        return None
    try:
        return int(value) if column in _WHOLE else float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {column} must be a number, got {value!r}") from None


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
