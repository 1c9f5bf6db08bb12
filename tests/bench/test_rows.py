"""Rows go to files and come back; a bad file is named."""

import errno
import math
from dataclasses import asdict, replace

import pytest

from emanet_triton.bench.rows import COLUMNS, Row, read_rows, write_csv
from emanet_triton.errors import InputError

ROWS = [
    Row(
        *("em", "block B=1 N=32768 bf16", "triton", "passed", 1.25e-3, 0.01, 1.5, 2.0, 2.5, 15),
        *(2.25, 73.0, "graph"),
        *(3.0, 2.5, 3.5, 12.5, 0.5, 4.0, 100.0, 0.25, "0.14-0.175", 'a "name", 2 cores', 2),
        *("bf16", "570.1", "2.15", "3.9", "abc", "2026-11-23", 20.5, 0.125, 0.0625),
        "openvino 2026.4.1, onnxruntime 1.32.0",
    ),
    Row("em", "block", "tensorrt", "absent: ModuleNotFoundError: no such module"),
]


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    write_csv(path, ROWS)
    assert read_rows(path) == ROWS


def test_the_columns_are_in_the_schemas_order():
    assert COLUMNS[:6] == ("suite", "case", "provider", "gate", "error", "bound")
    assert COLUMNS[-3:] == ("matmul_tflop_s", "noise", "runtimes")


def test_an_older_file_lacks_the_last_column(tmp_path):
    rows = [replace(row, runtimes="") for row in ROWS]
    path = tmp_path / "rows.csv"
    write_csv(path, rows)
    header, *lines = path.read_text().splitlines()
    older = header.removesuffix(",runtimes"), *(line.removesuffix(",") for line in lines)
    path.write_text("\n".join(older))
    assert read_rows(path) == rows


def test_a_write_that_fails_leaves_the_rows_of_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_csv(path, ROWS)
    monkeypatch.setattr("emanet_triton.files.write_whole", _no_space)
    with pytest.raises(InputError, match=r"rows\.csv: cannot be written \(No space left"):
        write_csv(path, ROWS[:1])
    assert read_rows(path) == ROWS


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_csv_keeps_five_digits(tmp_path):
    write_csv(tmp_path / "rows.csv", [Row("em", "block", "triton", "absent", noise=1.2345678)])
    assert read_rows(tmp_path / "rows.csv")[0].noise == 1.2346


def test_what_is_not_a_finite_number_is_not_measured(tmp_path):
    rows = [Row("em", "block", name, "absent: why", copy_gb_s=math.nan) for name in "ab"]
    write_csv(tmp_path / "rows.csv", rows)
    assert [row.copy_gb_s for row in read_rows(tmp_path / "rows.csv")] == [None, None]


def line(**columns):
    """A line of a table in which some columns are replaced."""
    return ",".join(str(value) for value in (asdict(PLAIN) | columns).values()) + "\n"


HEADER = ",".join(COLUMNS) + "\n"
PLAIN = replace(ROWS[0], case="block", device="A processor", runtimes="")
NO_TIME = "must be a number above 0 where the gate is passed"
BAD_FILES = {
    "header.csv": (
        HEADER.replace("cold_ms,host_us,", ""),
        ", line 1: missing columns: cold_ms, host_us",
    ),
    "order.csv": (
        ",".join(sorted(COLUMNS)) + "\n",
        f", line 1: expected the columns in the order {', '.join(COLUMNS)}",
    ),
    "empty.csv": ("", f", line 1: missing columns: {', '.join(COLUMNS)}"),
    "more.csv": (HEADER.strip() + ",more\n", ", line 1: unknown columns: more"),
    "short.csv": (f"{HEADER}em,block\n", ", line 2: expected 34 values, got 2"),
    "number.csv": (
        HEADER + line(error="low"),
        ", line 2: error must be a number of at least 0, got 'low'",
    ),
    "whole.csv": (
        HEADER + line(threads=2.5),
        ", line 2: threads must be a whole number of at least 0, got '2.5'",
    ),
    "negative.csv": (
        HEADER + line(peak_mb=-1),
        ", line 2: peak_mb must be a number of at least 0, got '-1'",
    ),
    "no-time.csv": (HEADER + line(p50_ms=""), f", line 2: p50_ms {NO_TIME}"),
    "nan.csv": (HEADER + line(p80_ms="nan"), f", line 2: p80_ms {NO_TIME}"),
    "ratio.csv": (
        HEADER + line(ratio_p20=""),
        ", line 2: ratio_p20 and ratio_p80 must be numbers where ratio is one",
    ),
    "twice.csv": (
        HEADER + line() + line(),
        ", line 3: expected one row for each provider, em: block: triton is there twice",
    ),
    "long.csv": (
        HEADER + line(gate="x" * 200_000),
        ", line 2: not CSV: field larger than field limit (131072)",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name}{message}"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read: No such file"):
        read_rows(tmp_path / "gone.csv")


def test_an_unwritable_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)$"):
        write_csv(tmp_path, ROWS)


def test_the_baseline_is_the_row_whose_ratio_has_no_spread():
    baseline = replace(ROWS[0], ratio=1.0, ratio_p20=1.0, ratio_p80=1.0)
    assert baseline.is_baseline
    assert not replace(baseline, ratio_p20=0.9).is_baseline
    assert not ROWS[1].is_baseline
