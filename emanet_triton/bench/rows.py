"""The rows that every suite writes, and their files."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from emanet_triton.errors import InputError
from emanet_triton.files import write_output

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


class Key(NamedTuple):
    """What no two rows of a file share, and two rows that are compared do."""

    suite: str
    case: str
    provider: str
    device: str
    dtype: str
    threads: int | None

    @classmethod
    def of(cls, row: Row) -> "Key":
        return cls(*(getattr(row, name) for name in cls._fields))

    def __str__(self) -> str:
        return f"{self.suite}: {self.case}: {self.provider}"


COLUMNS = tuple(field.name for field in fields(Row))
_WHOLE = {"rounds", "threads"}
_TEXT = {field.name for field in fields(Row) if field.type is str}
_DIGITS = 5


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
    write_output(path, text.encode(), make_folder=True)


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_csv`` or, by the suffix .json, ``write_json`` wrote.

    A number that is not finite counts as not measured.

    Raises:
        InputError: a file that cannot be read or is not such a file; it names the line. Also a row
            that passed without a time, and a second row of one provider at a case.
    """
    read = _read_json if path.suffix == ".json" else read_csv
    rows: dict[Key, Row] = {}
    for where, values in read(path, COLUMNS):
        row = Row(*(_value(where, *pair) for pair in values.items()))
        _check(where, row)
        key = Key.of(row)
        if key in rows:
            raise InputError(f"{where}: expected one row for each provider, {key} is there twice")
        rows[key] = row
    return list(rows.values())


def read_csv(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Read a table: for every line where it stands, for messages, and its values by column.

    Raises:
        InputError: a file that cannot be read or has other columns; it names the line.
    """
    reader = csv.reader(read_text(path).splitlines())
    rows = []
    try:
        _check_columns(f"{path}, line 1", next(reader, []), columns)
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if len(values) != len(columns):
                raise InputError(f"{where}: expected {len(columns)} values, got {len(values)}")
            rows.append((where, dict(zip(columns, values, strict=True))))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    return rows


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path}: cannot be read: {reason}") from None


def _read_json(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, object]]]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}: expected a list of rows, it is nested too deeply") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list of rows")
    rows = []
    for number, item in enumerate(content, 1):
        where = f"{path}, row {number}"
        if not isinstance(item, dict):
            raise InputError(f"{where}: expected an object, got {item!r}")
        _check_columns(where, list(item), columns)
        rows.append((where, {name: "" if v is None else v for name, v in item.items()}))
    return rows


def _check_columns(where: str, found: Sequence[str], columns: Sequence[str]) -> None:
    """Say what is wrong with a header."""
    if list(found) == list(columns):
        return
    missing = [name for name in columns if name not in found]
    if missing:
        raise InputError(f"{where}: missing columns: {', '.join(missing)}")
    unknown = [name for name in found if name not in columns]
    if unknown:
        raise InputError(f"{where}: unknown columns: {', '.join(unknown)}")
    raise InputError(f"{where}: expected the columns in the order {', '.join(columns)}")


def _check(where: str, row: Row) -> None:
    """Whether what belongs together is there."""
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        value = getattr(row, name)
        if row.gate == PASSED and not (value and value > 0):
            raise InputError(f"{where}: {name} must be a number above 0 where the gate is passed")
    if row.ratio is not None and None in (row.ratio_p20, row.ratio_p80):
        raise InputError(f"{where}: ratio_p20 and ratio_p80 must be numbers where ratio is one")


def _value(where: str, column: str, value: object) -> str | float | int | None:
    if column in _TEXT:
        return str(value)
    if value == "":
        return None
    try:
        number = int(value) if column in _WHOLE else float(value)
        if not math.isfinite(number):
            return None
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0:
        kind = "a whole number" if column in _WHOLE else "a number"
        raise InputError(f"{where}: {column} must be {kind} of at least 0, got {value!r}")
    return number


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
