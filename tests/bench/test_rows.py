"""Rows go to files and come back; a bad file is named."""

import errno

import pytest

from emanet_triton.bench.rows import COLUMNS, Row, read_rows, write_csv, write_json
from emanet_triton.errors import InputError

ROWS = [
    Row(
        *("em", "block B=1 N=32768 bf16", "triton", "passed", 1.25e-3, 0.01, 1.5, 2.0, 2.5, 15),
        *(2.25, 73.0, "graph"),
        *(3.0, 2.5, 3.5, 12.5, 0.5, 4.0, 100.0, 0.25, "0.14-0.175", 'a "name", 2 cores', 2),
        *("bf16", "570.1", "2.15", "3.9", "abc", "2026-11-23", 20.5, 0.125, 0.0625),
    ),
    Row("em", "block", "tensorrt", "absent: ModuleNotFoundError: no such module"),
]


@pytest.mark.parametrize(("write", "name"), [(write_csv, "rows.csv"), (write_json, "rows.json")])
def test_rows_come_back(tmp_path, write, name):
    path = tmp_path / "new" / name
    write(path, ROWS)
    assert read_rows(path) == ROWS


def test_the_columns_are_in_the_schemas_order():
    assert COLUMNS[:6] == ("suite", "case", "provider", "gate", "error", "bound")
    assert COLUMNS[-3:] == ("copy_gb_s", "matmul_tflop_s", "noise")


def test_a_write_that_fails_leaves_the_rows_of_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_csv(path, ROWS)
    monkeypatch.setattr("emanet_triton.bench.rows.write_whole", _no_space)
    with pytest.raises(InputError, match=r"rows\.csv: cannot be written: No space left"):
        write_csv(path, ROWS[:1])
    assert read_rows(path) == ROWS


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_csv_keeps_five_digits(tmp_path):
    write_csv(tmp_path / "rows.csv", [Row("em", "block", "triton", "passed", p50_ms=1.2345678)])
    assert read_rows(tmp_path / "rows.csv")[0].p50_ms == 1.2346


BAD_FILES = {
    "header.csv": ("suite,case\n", "header.csv, line 1: expected the columns suite,case,"),
    "empty.csv": ("", "empty.csv, line 1: expected the columns"),
    "short.csv": (",".join(COLUMNS) + "\nem,block\n", "line 2: expected 33 values, got 2"),
    "number.csv": (
        ",".join(COLUMNS) + "\nem,block,x,passed,low" + "," * 28 + "\n",
        "line 2: error must be a number, got 'low'",
    ),
    "broken.json": ("[\n{", "broken.json, line 2: not JSON"),
    "object.json": ("{}", "object.json: expected a list of rows"),
    "columns.json": ('[{"suite": "em"}]', "columns.json, row 1: expected an object of suite"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        read_rows(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.csv: cannot be read: No such file"):
        read_rows(tmp_path / "gone.csv")


@pytest.mark.parametrize("write", [write_csv, write_json])
def test_an_unwritable_file_is_named(tmp_path, write):
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write(tmp_path, ROWS)
