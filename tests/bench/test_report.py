"""``report``: from rows to the page and charts and back; what disagrees is found."""

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from example_rows import cpu_rows, gpu_rows

from emanet_triton.bench import blocks, charts, plots
from emanet_triton.bench.__main__ import main
from emanet_triton.bench.ahead_of_time.gates import COLUMNS
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.rows import write_csv
from emanet_triton.models.zoo import ZOO

ROOT = Path(__file__).parents[2]
COMPILED = [
    [
        "em_e_step",
        "sm_90",
        "bf16",
        "a",
        "b",
        "200",
        "0",
        "1024",
        "HGMMA",
        "4",
        "0",
        "16",
        "16",
        "3.6",
    ],
    [
        "em_e_step",
        "sm_90",
        "bf16",
        "c",
        "d",
        "150",
        "0",
        "2048",
        "HGMMA",
        "8",
        "0",
        "16",
        "16",
        "3.6",
    ],
    ["em_e_step", "gfx942", "bf16", "e", "f", "90", "0", "16", "", "0", "0", "16", "16", "3.6"],
]


def test_this_repositorys_page_agrees_with_its_results(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(ZOO, "tiny", raising=False)  # other tests add it
    assert main(["report", "--check"]) == 0, capsys.readouterr().out


class Folder:
    """A page with every block, and results."""

    def __init__(self, root: Path) -> None:
        self.page, self.results = root / "page.md", root / "results"
        self.results.mkdir()
        text = "".join(f"{n}\n<!-- bench:{n} -->\n<!-- /bench -->\n" for n in blocks.BLOCKS)
        self.page.write_text(f"Before.\n{text}After.\n")

    def report(self, *arguments: str) -> int:
        paths = ["--results", str(self.results), "--page", str(self.page)]
        return main(["report", *arguments, *paths])

    def measured(self) -> "Folder":
        """With rows of a CPU, of a GPU and of the compiler, and the report made."""
        write_csv(self.results / "em_cpu.csv", cpu_rows())
        write_csv(self.results / "em_g100.csv", gpu_rows())
        with (self.results / "compiled.csv").open("w") as file:
            csv.writer(file).writerows([COLUMNS, *COMPILED])
        assert self.report() == 0
        return self


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With charts that hold their digest alone: drawing them takes seconds."""
    monkeypatch.setattr(plots, "svg", lambda chart: f"<svg>{chart.digest}</svg>".encode())
    return Folder(tmp_path)


def block(folder, name):
    text = folder.page.read_text()
    return re.search(rf"<!-- bench:{name} -->\n(.*?)<!-- /bench -->", text, re.S)[1]


def line(text, *words):
    """The one line that begins with a word and has all of them; its cells."""
    (found,) = [t for t in text.splitlines() if all(word in t for word in words)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_round_trip(folder, capsys):
    folder.measured()
    before = folder.page.read_text(), sorted(p.read_bytes() for p in folder.results.iterdir())
    assert folder.report("--check") == 0
    assert folder.report() == 0
    assert before == (
        folder.page.read_text(),
        sorted(p.read_bytes() for p in folder.results.iterdir()),
    )
    assert before[0].startswith("Before.\nem\n<!-- bench:em -->\n")
    assert before[0].endswith("<!-- /bench -->\nAfter.\n")


def test_figures_reach_their_cells(folder):
    folder.measured()
    cells = line(block(folder, "em"), "N=8192", "nchw")
    assert cells[1:] == ["600", "500, 1.20× (1.08–1.32)", "353, 1.70× (1.53–1.87)", "150"]
    assert "Example CPU, 2 cores; 2 threads; PyTorch 2.11; Triton 3.6" in block(folder, "em")
    assert "matmul 2 TFLOP/s (fp32); noise 2.0%" in block(folder, "em")
    assert line(block(folder, "model"), "| r50 ", "whole", "4.58")[3:] == [
        *("Example G100", "10.0", "not measured", "80.0")
    ]
    assert line(block(folder, "train-mem"), "512x1024", "6.2")[-1] == "not measured"
    assert line(block(folder, "train-mem"), "512x1024", "5.4")[-1] == "5.4"
    said = "- 26 convolutions of r50-whole, fp32: torch 1.165e+04 ms, the fastest of each"
    assert said in block(folder, "conv")
    assert "<details><summary>13 cases</summary>" in block(folder, "conv")
    assert "the network is the limit" in block(folder, "eval")
    assert "mmseg: time grows as pixels ^ 1.00 (R² 1.000, 3 points)" in block(folder, "scale")


def test_predictions_stand_in_a_column_of_their_own(folder):
    folder.measured()
    header = line(block(folder, "em"), "triton", "predicted")
    assert header == ["median, ms", "mmseg", "triton", "torch", "predicted, ms"]
    assert line(block(folder, "em"), "bf16 channels-last", "×")[2:] == [
        *("0.2, 7.50× (6.75–8.25)", "0.75, 2.00× (1.80–2.20)", "0.14-0.175")
    ]
    forecasts = ["0.2-0.23", "0.14-0.175"]
    measured = line(block(folder, "em"), "B=1 N=32768 bf16 ", "0.2-0.23")
    assert measured[1:] == ["0.2 (Example G100)", *forecasts]
    (folder.results / "em_g100.csv").unlink()
    folder.report()
    assert line(block(folder, "em"), "B=1 N=32768 bf16")[1:] == ["not measured", *forecasts]


def test_a_gpu_has_tables_of_cold_times_and_of_the_hosts(folder):
    folder.measured()
    text = block(folder, "em")
    tables = text.split("\n\n")
    (cold,) = [t for t in tables if t.startswith("| median with a cold L2 cache, ms ")]
    (host,) = [t for t in tables if t.startswith("| host time of a call, µs ")]
    assert line(cold, "bf16")[1:] == ["1.6", "0.25", "0.8"]
    assert line(host, "bf16")[1:] == ["310", "812", "420"]
    assert "- torch cannot be captured: its launches are timed\n" in text
    assert "captured" not in block(folder, "conv")


def test_who_was_not_there_is_said(folder):
    folder.measured()
    assert "- onnxruntime absent: No module named 'onnxruntime'" in block(folder, "model")
    assert "- mmseg-compiled failed: error 1" in block(folder, "em")


def test_the_worst_of_each_kernel(folder):
    folder.measured()
    text = block(folder, "compiled")
    assert "3 compilations of 1 kernels for 2 targets by Triton 3.6; none uses a stack" in text
    assert line(text, "em_e_step")[2:] == ["200 regs, 2 KiB, 4–8 HGMMA", "90 regs, 16 B"]


def test_what_is_not_measured_says_so(folder):
    assert folder.report() == 0
    for name in ("em", "conv", "model", "post", "train-mem", "eval", "scale", "roofline"):
        assert "Not measured yet." in block(folder, name)
    assert "Not compiled yet." in block(folder, "compiled")
    assert folder.report("--check") == 0


def test_tampering_is_found(folder, capsys):
    folder.measured()
    text = folder.page.read_text()
    folder.page.write_text(text.replace("2,333", "2,334"))
    svg = folder.results / "scale_cpu2.svg"
    svg.write_text(re.sub("figures-.{8}", "figures-00000000", svg.read_text()))
    (folder.results / "roofline_cpu2.svg").unlink()
    assert folder.report("--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{folder.page}: block 'em' disagrees with the results",
        f"{folder.results}/roofline_cpu2.svg: is missing",
        f"{svg}: was drawn from other figures",
    ]
    assert folder.report() == 0
    assert folder.page.read_text() == text
    assert folder.report("--check") == 0


def test_charts_of_dropped_results_go(folder, capsys):
    folder.measured()
    (folder.results / "own.svg").write_text("<svg/>")  # not drawn here
    (folder.results / "em_g100.csv").unlink()
    assert folder.report("--check") == 1
    assert "ratios_em_g100.svg: there are no figures for it" in capsys.readouterr().out
    folder.report()
    left = {path.name for path in folder.results.glob("*.svg")}
    assert left == {"own.svg", *(f"{chart.name}.svg" for chart in charts.charts_of(cpu_rows()))}


def test_without_matplotlib_tables_are_made(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder.measured()
    assert "the charts are not drawn: matplotlib is not installed" in capsys.readouterr().out
    assert "353, 1.70×" in block(folder, "em")
    with pytest.raises(plots.InputError, match="pip install matplotlib"):
        plots.write_plots(cpu_rows(), folder.results)


def test_charts_are_svg_and_the_same_every_time(tmp_path):
    rows = [row for row in cpu_rows() if row.suite in ("em", "scale")]
    plots.write_plots(rows, tmp_path)
    drawn = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(drawn) == {"roofline_cpu2", "ratios_em_cpu2", "scale_cpu2"}
    for chart in charts.charts_of(rows):
        text = drawn[chart.name].decode()
        assert "</svg>" in text
        assert "<dc:date>" not in text
        assert charts.digest_of(text) == chart.digest
        assert plots.svg(chart) == drawn[chart.name]


def test_a_ratio_chart_is_of_the_cases_that_take_the_longest(monkeypatch):
    monkeypatch.setattr(charts, "MOST_CASES", 3)
    rows = [row for row in cpu_rows() if row.suite == "conv"]
    (_, chart) = charts.charts_of(rows)
    assert "(the 3 longest of 13 cases)" in chart.title
    shown = dict.fromkeys(case.split()[1] for case, *_ in chart.figures)
    assert list(shown) == ["C=704", "C=768", "C=832"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:emm -->\n<!-- /bench -->\n", "line 2: no block 'emm'; expected em, conv"),
        ("<!-- bench:em -->\n", "line 2: expected <!-- /bench --> after block 'em'"),
        (
            "<!-- bench:em -->\n<!-- bench:post -->\n<!-- /bench -->\n",
            "line 2: expected <!-- /bench --> after block 'em'",
        ),
        ("", "expected blocks <!-- bench:NAME -->, there are none"),
    ],
)
def test_bad_pages(folder, capsys, text, message):
    folder.page.write_text("# Title\n" + text)
    assert folder.report() == 2
    assert message in capsys.readouterr().err


def test_rows_of_a_rehearsal_are_refused(folder, capsys):
    write_csv(folder.results / "em_gpu.csv", [replace(gpu_rows()[0], device=REHEARSAL)])
    before = folder.page.read_text()
    assert folder.report() == 2
    path = folder.results / "em_gpu.csv"
    message = f"error: {path}: expected measured rows, these are of a rehearsal\n"
    assert capsys.readouterr().err == message
    assert folder.page.read_text() == before


def test_a_compilation_without_a_number(folder, capsys):
    lines = [COLUMNS, COMPILED[0], [*COMPILED[0][:5], "many", *COMPILED[0][6:]]]
    path = folder.results / "compiled.csv"
    path.write_text("".join(",".join(values) + "\n" for values in lines))
    assert folder.report() == 2
    message = f"error: {path}, line 3: registers must be a whole number, got 'many'\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("suite", "columns", "message"),
    [
        ("scale", {"case": "large"}, r"large: mmseg: the case must match \d+x\d+ \S+$"),
        ("eval", {"case": "all"}, r"all: evaluation: the case must match images=\d+( |$)"),
        ("conv", {"case": "one", "floor_ms": None}, "one: torch: floor_ms must be a number"),
    ],
    ids=["scale", "eval", "conv"],
)
def test_rows_that_the_report_cannot_use(folder, capsys, suite, columns, message):
    row = next(row for row in cpu_rows() if row.suite == suite)
    path = folder.results / "x.csv"
    write_csv(path, [replace(row, **columns)])
    assert folder.report() == 2
    assert capsys.readouterr().err == f"error: {path}: {suite}: {message}\n"


def test_a_machine_without_a_name(folder):
    rows = [replace(row, device="") for row in gpu_rows()]
    assert [chart.name for chart in charts.charts_of(rows)] == ["ratios_em_", "ratios_model_"]


def test_bad_results_and_arguments(folder, capsys):
    (folder.results / "x.csv").write_text("a,b\n")
    assert folder.report("--check") == 2
    assert "x.csv, line 1: missing columns: suite, case, " in capsys.readouterr().err
    (folder.results / "x.csv").unlink()
    (folder.results / "compiled.csv").write_text("a,b\n")
    assert folder.report("--check") == 2
    assert "compiled.csv, line 1: missing columns: kernel, " in capsys.readouterr().err
    assert main(["report", "--results", str(folder.results / "none")]) == 2
    assert folder.report("--what") == 2
    folder.page.unlink()
    assert folder.report() == 2
    assert capsys.readouterr().err.count("error: ") == 3
