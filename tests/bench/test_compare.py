"""``compare``: what counts as faster or slower, and what it says and returns."""

from dataclasses import replace

import pytest

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.compare import verdict
from emanet_triton.bench.rows import COLUMNS, Row, write_csv

ROW = Row(
    *("em", "block", "torch", "passed"),
    p20_ms=98.0,
    p50_ms=100.0,
    p80_ms=102.0,
    device="A processor",
    threads=2,
    dtype="fp32",
    torch="2.11",
    noise=0.02,
)


def times(scale, row=ROW):
    return replace(
        row, p20_ms=row.p20_ms * scale, p50_ms=row.p50_ms * scale, p80_ms=row.p80_ms * scale
    )


@pytest.mark.parametrize(
    ("scale", "noise", "word"),
    [
        (1.0, 0.02, "same"),
        (1.05, 0.02, "same"),  # 102.9 to 107.1 against 102 and its noise
        (1.07, 0.02, "slower"),
        (0.95, 0.02, "same"),
        (0.93, 0.02, "faster"),
        (1.07, 0.2, "same"),  # of a noisy machine
        (1.05, 0.0, "same"),  # 1% is allowed to any
        (1.06, None, "slower"),
    ],
)
def test_a_change_has_to_pass_the_spread_and_the_noise(scale, noise, word):
    quiet = replace(ROW, noise=noise)
    assert verdict(quiet, replace(times(scale), noise=noise)) == word


def failed(why):
    return Row("em", "block", "torch", why, device="A processor", threads=2, dtype="fp32")


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (ROW, failed("failed: error 1"), "broken"),
        (failed("failed: error 1"), ROW, "mended"),
        (ROW, failed("absent: no such package"), "no time"),
        (replace(ROW, clock="events"), replace(times(2.0), clock="graph"), "another clock"),
    ],
)
def test_what_cannot_be_compared(a, b, word):
    assert verdict(a, b) == word


def compare(tmp_path, a, b):
    for name, rows in (("a.csv", a), ("b.csv", b)):
        write_csv(tmp_path / name, rows)
    return main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])


def test_a_regression_is_exit_1(tmp_path, capsys):
    other = replace(ROW, provider="mmseg")
    assert compare(tmp_path, [ROW, other], [times(1.5), times(0.5, other)]) == 1
    out = capsys.readouterr().out
    assert "+50.0%" in out
    assert "-50.0%" in out
    assert "2 rows compared: 1 faster, 1 slower" in out


def test_noise_is_tolerated(tmp_path, capsys):
    assert compare(tmp_path, [ROW], [times(1.04)]) == 0
    assert capsys.readouterr().out == "1 rows compared: 0 faster, 0 slower, 1 same\n"


def test_broken_is_a_regression(tmp_path, capsys):
    assert compare(tmp_path, [ROW], [failed("failed: error 3")]) == 1
    assert "failed: error 3" in capsys.readouterr().out


def test_it_says_what_the_files_do_not_share(tmp_path, capsys):
    only_a, only_b = replace(ROW, case="first"), replace(ROW, case="second", device="A GPU")
    assert compare(tmp_path, [ROW, only_a], [replace(ROW, torch="2.12"), only_b]) == 0
    out = capsys.readouterr().out
    assert "note: torch differs: 2.11 and 2.12" in out
    assert "note: devices differ: A processor, 2 threads and A processor, 2 threads; A GPU" in out
    assert "note: only in the first file: em: first: torch" in out
    assert "note: only in the second file: em: second: torch" in out


def test_the_flag_of_the_same_name(tmp_path):
    write_csv(tmp_path / "a.csv", [ROW])
    assert main(["--compare", str(tmp_path / "a.csv"), str(tmp_path / "a.csv")]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "b.csv: cannot be read"),
        ("a,b\n", "b.csv, line 1: missing columns: suite, case, "),
        (",".join(COLUMNS) + "\n", "b.csv: expected rows, there are none"),
        (",".join(COLUMNS) + "\nem,block\n", "b.csv, line 2: expected 34 values, got 2"),
    ],
    ids=["missing", "other columns", "empty", "short line"],
)
def test_bad_files_are_exit_2(tmp_path, capsys, text, message):
    write_csv(tmp_path / "a.csv", [ROW])
    if text is not None:
        (tmp_path / "b.csv").write_text(text)
    assert main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_files_that_cannot_be_compared(tmp_path, capsys):
    assert compare(tmp_path, [ROW], [replace(ROW, device="A GPU", threads=None)]) == 2
    assert "devices: A processor, 2 threads and A GPU" in capsys.readouterr().err
    assert compare(tmp_path, [ROW, ROW], [ROW]) == 2
    assert "em: block: torch is there twice" in capsys.readouterr().err
    assert main(["compare", "a.csv"]) == 2
    assert "B.csv" in capsys.readouterr().err
