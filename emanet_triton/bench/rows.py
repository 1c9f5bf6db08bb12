"""The rows that every suite writes, and their files."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from emanet_triton.errors import InputError
from emanet_triton.files import require_own, require_writable, write_output

PASSED = "passed"


@dataclass(frozen=True)
class Row:
    """One provider at one case. ``None`` means not measured, or not applicable.

    Attributes:
        suite, case: what was run; together the key that joins the rows of different runs.
        provider: who ran it.
        gate: ``"passed"``, ``"absent: why"`` or ``"failed: why"``. Only a row that passed has
            times.
        error, bound: the error of the result against the suite's reference, and the largest error
            that passes.
        p20_ms, p50_ms, p80_ms: percentiles of the times of one call. On a GPU its L2 cache is warm.
        rounds: number of these times.
        cold_ms: median time of one call on a GPU whose L2 cache has just been overwritten.
        host_us: microseconds that the host needs to launch one call on a GPU without a graph.
        clock: ``"graph"``, the replay of a CUDA graph; ``"events"``, the launches of a call that
            cannot be captured; or ``"wall"``, wall clock.
        ratio, ratio_p20, ratio_p80: how many times faster than the baseline of the same round,
            median and percentiles.
        peak_mb: peak memory in 10^6 bytes, above what was there before the provider was made.
        floor_ms: the smallest time that the machine's copy and matmul rates allow.
        x_floor: p50 divided by the floor.
        gb_s, tflop_s: the floor's bytes and FLOPs divided by p50.
        predicted_ms: a forecast made before anything was measured.
        device, threads, dtype, driver, torch, triton, commit, date: where, with what and when.
        copy_gb_s, matmul_tflop_s: the machine's rates, measured in the same run.
        noise: (p80 - p20) / p50 of a fixed matrix product in the same run.
        runtimes: other software that runs networks, with its versions, as ``Machine.runtimes``.
            Files made before 2026-11-30 lack this column.
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
    runtimes: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether the ratios of this row compare the baseline with itself."""
        return self.ratio == self.ratio_p20 == self.ratio_p80 == 1


class Key(NamedTuple):
    """What identifies a row in a file, and pairs the rows of two files."""

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
_LATER = 1  # how many of the last columns older files lack
_WHOLE = {"rounds", "threads"}
_TEXT = {field.name for field in fields(Row) if field.type is str}
_DIGITS = 5
_BEGINNING = re.compile(",".join(COLUMNS[:4]).encode())  # also of rows with older columns


def require_csv(path: Path) -> None:
    """Check that ``write_csv`` can write the file, and that it replaces only rows of its own.

    Raises:
        InputError: it cannot, or a file of another kind is there.
    """
    require_writable(path)
    require_own(path, _BEGINNING, "table of emanet-triton bench")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows with five significant digits. A run that is killed leaves its last file whole.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(value) for value in asdict(row).values()] for row in rows)
    write_output(path, text.getvalue().encode(), make_folder=True)


def read_rows(path: Path) -> list[Row]:
    """Read what ``write_csv`` wrote, in older files too. A number that is not finite counts as
    not measured.

    Raises:
        InputError: the file cannot be read or is malformed, a row passed without a time, or a
            provider has two rows at one case. The message names the line.
    """
    rows: dict[Key, Row] = {}
    for where, values in read_csv(path, COLUMNS, _LATER):
        columns: dict[str, Any] = {name: _value(where, name, v) for name, v in values.items()}
        row = Row(**columns)
        _check(where, row)
        key = Key.of(row)
        if key in rows:
            raise InputError(f"{where}: expected one row for each provider, {key} is there twice")
        rows[key] = row
    return list(rows.values())


def read_csv(
    path: Path, columns: Sequence[str], later: int = 0
) -> list[tuple[str, dict[str, str]]]:
    """Read a table: for each line a description of its place, and its values by column.

    Args:
        path: the file.
        columns: their names, in order.
        later: how many of the last columns a file may lack, all of them together.

    Raises:
        InputError: the file cannot be read or has other columns. The message names the line.
    """
    reader = csv.reader(read_text(path).splitlines())
    rows = []
    try:
        found, older = next(reader, []), columns[: len(columns) - later]
        if found == list(older):
            columns = older
        _check_columns(f"{path}, line 1", found, columns)
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
        InputError: the file cannot be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path}: cannot be read: {reason}") from None


def _check_columns(where: str, found: Sequence[str], columns: Sequence[str]) -> None:
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
    for name in ("p20_ms", "p50_ms", "p80_ms"):
        value = getattr(row, name)
        if row.gate == PASSED and not (value and value > 0):
            raise InputError(f"{where}: {name} must be a number above 0 where the gate is passed")
    if row.ratio is not None and None in (row.ratio_p20, row.ratio_p80):
        raise InputError(f"{where}: ratio_p20 and ratio_p80 must be numbers where ratio is one")


def _value(where: str, column: str, text: str) -> str | float | int | None:
    if column in _TEXT:
        return text
    if text == "":
        return None
    number: float = -1
    try:
        number = int(text) if column in _WHOLE else float(text)
        if not math.isfinite(number):
            return None
    except (ValueError, OverflowError):
        number = -1
    if number < 0:
        kind = "a whole number" if column in _WHOLE else "a number"
        raise InputError(f"{where}: {column} must be {kind} of at least 0, got {text!r}")
    return number


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
