"""A suite that is added from outside the package: one value, entered into the registry."""

import pytest

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.case import Case
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.suite import Suite
from emanet_triton.bench.suites import SUITES


def cases(selection):
    for size in selection.sizes or [(2, 3)]:
        numbers = list(range(size[0] * size[1]))
        providers = {
            "loop": lambda numbers=numbers: lambda: sum(1 * n for n in numbers),
            "builtin": lambda numbers=numbers: lambda: sum(numbers),
        }
        yield Case(
            suite="toy",
            name=f"sum {size[0]}x{size[1]}",
            providers=selection.pick(providers, "loop"),
            baseline="loop",
            error=lambda got, numbers=numbers: abs(got - len(numbers) * numbers[-1] / 2),
            bound=0.0,
        )


@pytest.fixture
def toy(monkeypatch):
    suite = Suite(
        name="toy",
        title="Sums",
        measures="sums of numbers",
        cases=cases,
        text="`loop` multiplies first.",
        published=lambda rows: f"{len(rows)} rows beside nothing published.",
        summary=lambda rows: f"{len(rows)} rows in this run",
    )
    monkeypatch.setitem(SUITES, "toy", suite)
    return suite


def test_it_is_run_written_printed_and_reported(toy, tmp_path, capsys):
    results, page = tmp_path / "results", tmp_path / "page.md"
    asked = ["toy", "--tiny", "--threads", "1", "--sizes", "20x30", "40x50"]
    assert main([*asked, "--csv", str(results / "toy_cpu.csv")]) == 0
    rows = read_rows(results / "toy_cpu.csv")
    assert [(row.suite, row.case, row.provider) for row in rows] == [
        ("toy", f"sum {size}", provider)
        for size in ("20x30", "40x50")
        for provider in ("loop", "builtin")
    ]
    assert all(row.gate == "passed" and row.p50_ms > 0 for row in rows)
    assert "4 rows in this run" in capsys.readouterr().out

    paths = ["--results", str(results), "--page", str(page)]
    assert main(["report", *paths]) == 0
    text = page.read_text()
    assert "| `toy`       | sums of numbers" in text
    section = text.partition("\n## Sums\n")[2].partition("\n## ")[0]
    assert toy.text in section
    assert "4 rows beside nothing published." in section
    assert "| sum 20x30" in section
    assert "- 4 rows in this run" in section
    assert "(results/ratios_toy_cpu1.svg)" in section
    assert "builtin" in (results / "ratios_toy_cpu1.svg").read_text()
    assert main(["report", "--check", *paths]) == 0


def test_without_its_place_in_the_registry_it_is_unknown(capsys):
    assert main(["toy", "--tiny"]) == 2
    assert "unknown suite 'toy'; expected one of: em, " in capsys.readouterr().err
