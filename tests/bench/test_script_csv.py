"""The tables of scripts outside the suites: what they hold, and what they never replace."""

import csv

import pytest

from emanet_triton import versions
from emanet_triton.bench import exports, large_pages, training_memory
from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.errors import InputError


def test_each_row_has_its_place_the_versions_and_the_commit(tmp_path):
    path = tmp_path / "new" / "figures.csv"
    write_table(path, [{"case": "a, b", "ms": 1.5}, {"case": "c", "ms": 2}], device="A CPU")
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    where = {"device": "A CPU", **versions.versions(), "commit": versions.commit()}
    assert first == {"case": "a, b", "ms": "1.5", **where}
    assert second == {"case": "c", "ms": "2", **where}


def test_a_table_replaces_tables_only(tmp_path):
    path = tmp_path / "figures.csv"
    require_table(path)
    write_table(path, [{"ms": 1}])
    require_table(path)
    path.write_text("case,ms\na,1\n")
    with pytest.raises(InputError, match=r"figures\.csv: exists and is no table that a script"):
        require_table(path)


@pytest.mark.parametrize("script", [exports, large_pages, training_memory])
def test_a_script_refuses_a_file_of_another_kind_before_it_measures(script, tmp_path, capsys):
    path = tmp_path / "thesis.tex"
    path.write_text("\\documentclass{book}\n")
    assert script.main(["--csv", str(path)]) == 2
    assert "thesis.tex: exists and is no table" in capsys.readouterr().err
    assert path.read_text() == "\\documentclass{book}\n"
