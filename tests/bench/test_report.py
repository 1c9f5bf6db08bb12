"""``report``: from rows to the page and charts and back; what disagrees is found."""

import csv
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from example_rows import cpu_rows, gpu_rows, row

from emanet_triton.bench import charts
from emanet_triton.bench.__main__ import main
from emanet_triton.bench.ahead_of_time.gates import COLUMNS
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import write_csv
from emanet_triton.bench.suites import SUITES, model
from emanet_triton.models.zoo import ZOO

ROOT = Path(__file__).parents[2]
COMPILED = [
    line.split(",")
    for line in (
        "em_e_step,sm_90,bf16,a,b,200,0,1024,HGMMA,4,0,16,16,3.6",
        "em_e_step,sm_90,bf16,c,d,150,0,2048,HGMMA,8,0,16,16,3.6",
        "em_e_step,gfx942,bf16,e,f,90,0,16,,0,0,16,16,3.6",
    )
]


def test_this_repositorys_page_agrees_with_its_results(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delitem(ZOO, "tiny", raising=False)  # other tests add it
    assert main(["report", "--check"]) == 0, capsys.readouterr().out


class Folder:
    """A page, and results."""

    def __init__(self, root: Path) -> None:
        self.page, self.results = root / "page.md", root / "results"
        self.results.mkdir()

    def report(self, *arguments: str) -> int:
        paths = ["--results", str(self.results), "--page", str(self.page)]
        return main(["report", *arguments, *paths])

    def measured(self) -> "Folder":
        """Write rows of a CPU, of a GPU and of the compiler, and make the report."""
        write_csv(self.results / "em_cpu.csv", cpu_rows())
        write_csv(self.results / "em_g100.csv", gpu_rows())
        with (self.results / "compiled.csv").open("w") as file:
            csv.writer(file).writerows([COLUMNS, *COMPILED])
        assert self.report() == 0
        return self

    def section(self, title: str) -> str:
        """The text below a heading."""
        title = SUITES[title].title if title in SUITES else title
        return self.page.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Its charts hold only their digest, because drawing takes seconds."""
    monkeypatch.setattr(charts, "svg", lambda chart: f"<svg>{chart.digest}</svg>".encode())
    return Folder(tmp_path)


def line(text, *words):
    """The cells of the one line that contains all of some words."""
    (found,) = [t for t in text.splitlines() if all(word in t for word in words)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_only_a_page_that_was_made_here_is_replaced(folder, capsys):
    folder.page.write_text("# Notes\n")
    assert folder.report() == 2
    assert f"{folder.page}: exists and is no page of emanet-triton" in capsys.readouterr().err
    assert folder.page.read_text() == "# Notes\n"


def test_round_trip(folder, capsys):
    folder.measured()
    before = folder.page.read_text(), sorted(p.read_bytes() for p in folder.results.iterdir())
    assert folder.report("--check") == 0
    assert capsys.readouterr().out == "the page and the charts agree with the results\n"
    assert folder.report() == 0
    assert before == (
        folder.page.read_text(),
        sorted(p.read_bytes() for p in folder.results.iterdir()),
    )


def test_figures_reach_their_cells(folder):
    folder.measured()
    cells = line(folder.section("em"), "N=8192", "nchw")
    assert cells[1:] == ["600", "500, 1.20× (1.08–1.32)", "353, 1.70× (1.53–1.87)", "150"]
    assert "Example CPU, 2 cores; 2 threads; PyTorch 2.11; Triton 3.6" in folder.section("em")
    assert "matmul 2 TFLOP/s (fp32); noise 2.0%" in folder.section("em")
    assert line(folder.section("model"), "| r50 ", "whole", "4.58")[3:] == [
        *("Example G100", "10.0", "not measured", "80.0")
    ]
    assert line(folder.section("train-mem"), "512x1024", "6.2")[-1] == "not measured"
    assert line(folder.section("train-mem"), "512x1024", "5.4")[-1] == "5.4"
    said = "- 26 convolutions of r50-whole, fp32: torch 1.165e+04 ms, the fastest of each"
    assert said in folder.section("conv")
    assert "<details><summary>13 cases</summary>" in folder.section("conv")


def test_every_suite_has_its_text_tables_and_chart(folder):
    folder.measured()
    for suite in SUITES.values():
        assert suite.text in folder.section(suite.name)
    for suite in (SUITES[name] for name in ("em", "model", "post", "train-mem", "conv")):
        assert "| median, ms" in folder.section(suite.name)
        image = f"(results/ratios_{suite.name}_cpu2.svg)"
        assert (image in folder.section(suite.name)) == suite.chart
    assert "(results/roofline_cpu2.svg)" in folder.section("Arithmetic and memory traffic")


def test_rows_of_a_suite_that_is_gone_are_shown(folder):
    folder.measured()
    cells = line(folder.section("Earlier suites"), "post-processing 512x1024 fp32")
    assert cells[1:] == ["330", "30, 11.00× (9.90–12.10)"]


def test_predictions_stand_in_a_column_of_their_own(folder):
    folder.measured()
    header = line(folder.section("em"), "triton", "predicted")
    assert header == ["median, ms", "mmseg", "triton", "ours-torch", "predicted, ms"]
    assert line(folder.section("em"), "bf16 channels-last", "×")[2:] == [
        *("0.2, 7.50× (6.75–8.25)", "0.75, 2.00× (1.80–2.20)", "0.14-0.175")
    ]


def test_a_gpu_has_tables_of_cold_times_and_of_the_hosts(folder):
    folder.measured()
    text = folder.section("em")
    tables = text.split("\n\n")
    (cold,) = [t for t in tables if t.startswith("| median with a cold L2 cache, ms ")]
    (host,) = [t for t in tables if t.startswith("| host time of a call, µs ")]
    assert line(cold, "bf16")[1:] == ["1.6", "0.25", "0.8"]
    assert line(host, "bf16")[1:] == ["310", "812", "420"]
    assert "- ours-torch cannot be captured: its launches are timed\n" in text
    assert "captured" not in folder.section("conv")


def test_who_was_not_there_is_said(folder):
    folder.measured()
    absent = "- onnxruntime-fp32 absent: No module named 'onnxruntime'"
    assert absent in folder.section("model")
    assert "- mmseg-compiled failed: error 1" in folder.section("em")


def test_the_versions_of_other_runtimes_are_said(folder):
    rows = [replace(row, runtimes="openvino 2026.4.1") for row in cpu_rows()]
    write_csv(folder.results / "cpu.csv", rows)
    assert folder.report() == 0
    said = "; Triton 3.6; openvino 2026.4.1; commit abc1234, 2026-01-02; "
    assert said in folder.section("model")
    write_csv(folder.results / "cpu.csv", cpu_rows())
    assert folder.report() == 0
    assert said.replace("openvino 2026.4.1; ", "") in folder.section("model")


def test_the_worst_of_each_kernel(folder):
    folder.measured()
    text = folder.section("What the compiler says of each kernel")
    assert "3 compilations of 1 kernels for 2 targets by Triton 3.6; none uses a stack" in text
    assert line(text, "em_e_step")[2:] == ["200 regs, 2 KiB, 4–8 HGMMA", "90 regs, 16 B"]


def test_what_is_not_measured_says_so(folder):
    assert folder.report() == 0
    for name in (*SUITES, "Arithmetic and memory traffic"):
        assert "Not measured yet." in folder.section(name)
    assert "Not compiled yet." in folder.section("What the compiler says of each kernel")
    assert "Earlier suites" not in folder.page.read_text()
    assert folder.report("--check") == 0


def test_tampering_is_found(folder, capsys):
    folder.measured()
    text = folder.page.read_text()
    folder.page.write_text(text.replace("2,333", "2,334"))
    svg = folder.results / "ratios_post_cpu2.svg"
    svg.write_text(re.sub("figures-.{8}", "figures-00000000", svg.read_text()))
    (folder.results / "roofline_cpu2.svg").unlink()
    assert folder.report("--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{folder.page}: is out of date",
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
    assert left == {"own.svg", *(chart.file for chart in charts.charts_of(cpu_rows()))}


def test_without_matplotlib_tables_are_made(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder.measured()
    assert "the charts are not drawn: matplotlib is not installed" in capsys.readouterr().out
    assert "353, 1.70×" in folder.section("em")
    with pytest.raises(charts.InputError, match="pip install matplotlib"):
        charts.write_charts([], folder.results)


def test_charts_are_svg_and_the_same_every_time(tmp_path):
    found = charts.charts_of([row for row in cpu_rows() if row.suite == "em"])
    charts.write_charts(found, tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(drawn) == {"roofline_cpu2.svg", "ratios_em_cpu2.svg"}
    for chart in found:
        text = drawn[chart.file].decode()
        assert "</svg>" in text
        assert "<dc:date>" not in text
        assert charts.digest_of(text) == chart.digest
        assert charts.svg(chart) == drawn[chart.file]


def colors(chart):
    """The colours of data in a chart."""
    return set(re.findall(r"#[0-9a-f]{6}", charts.svg(chart).decode())) & {*charts.COLORS.values()}


def test_a_dtype_has_one_colour_everywhere():
    rows = [*cpu_rows(), row("em", "half", "mmseg", 2.0, dtype="bf16")]
    rows += [with_roof(row("em", "half", "ours-torch", 1.0, 2.0, dtype="bf16"))]
    found = {chart.kind: colors(chart) for chart in charts.charts_of(rows)}
    fp32, bf16 = charts.COLORS["fp32"], charts.COLORS["bf16"]
    assert found["roofline"] == found["em"] == found["model"] == {fp32, bf16}
    assert found["post"] == found["conv"] == {fp32}  # whatever the provider


def with_roof(item):
    return replace(item, gb_s=1.0, tflop_s=0.01, floor_ms=0.5)


def test_the_name_of_a_provider_says_its_dtype():
    (chart,) = charts.charts_of([row for row in cpu_rows() if row.suite == "model"])
    assert {(provider, dtype) for _, provider, dtype, *_ in chart.figures} == {
        ("fused-fp32", "fp32"),
        ("fused-bf16", "bf16"),
    }


def test_no_two_providers_look_alike(monkeypatch):
    looks = {}

    def errorbar(self, *_, fmt, color, label, **__):
        looks[label] = fmt, color
        self.plot([], [], fmt, color=color, label=label)

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", errorbar)
    _, *names = next(model.cases(Selection())).providers
    names.remove("tensorrt-bf16")  # it never runs on a CPU
    rows = [row("model", "r50 network", "plain-fp32", 9.0)]
    rows += [row("model", "r50 network", name, 3.0, 3.0) for name in names]
    (chart,) = charts.charts_of(rows)
    assert charts.svg(chart)
    assert list(looks) == names  # each has its dtype in its name
    assert len({*looks.values()}) == len(names)


def test_no_label_of_a_roof_can_hide_a_dot():
    (roofline, _) = charts.charts_of([row for row in cpu_rows() if row.suite == "em"])
    drawing, _, legend = charts.svg(roofline).decode().partition('id="legend_1"')
    for label in ("matmul fp32: 2 TFLOP/s", "copy: 20 GB/s"):
        assert label in legend
        assert label not in drawing


def test_a_ratio_chart_is_of_the_cases_that_take_the_longest(monkeypatch):
    monkeypatch.setattr(charts, "MOST_CASES", 3)
    rows = [row for row in cpu_rows() if row.suite == "conv"]
    (_, chart) = charts.charts_of(rows)
    assert "(the 3 longest of 13 cases)" in chart.title
    shown = dict.fromkeys(case.split()[1] for case, *_ in chart.figures)
    assert list(shown) == ["C=704", "C=768", "C=832"]


def test_rows_of_a_rehearsal_are_refused(folder, capsys):
    write_csv(folder.results / "em_gpu.csv", [replace(gpu_rows()[0], device=REHEARSAL)])
    assert folder.report() == 2
    path = folder.results / "em_gpu.csv"
    message = f"error: {path}: expected measured rows, these are of a rehearsal\n"
    assert capsys.readouterr().err == message
    assert not folder.page.exists()


def test_a_compilation_without_a_number(folder, capsys):
    lines = [COLUMNS, COMPILED[0], [*COMPILED[0][:5], "many", *COMPILED[0][6:]]]
    path = folder.results / "compiled.csv"
    path.write_text("".join(",".join(values) + "\n" for values in lines))
    assert folder.report() == 2
    message = f"error: {path}, line 3: registers must be a whole number, got 'many'\n"
    assert capsys.readouterr().err == message


def test_rows_with_names_and_without_figures_that_no_suite_writes(folder):
    odd = [replace(item, case="one", floor_ms=None) for item in cpu_rows()[:1]]
    odd += [replace(item, suite="conv", case="r50-whole=2", floor_ms=None) for item in odd]
    write_csv(folder.results / "x.csv", odd)
    assert folder.report() == 0
    assert line(folder.section("em"), "| one ")[1] == "600"


def test_a_machine_without_a_name(folder):
    rows = [replace(row, device="") for row in gpu_rows()]
    files = [chart.file for chart in charts.charts_of(rows)]
    assert files == ["ratios_em_.svg", "ratios_model_.svg"]


def test_bad_results_and_arguments(folder, capsys):
    (folder.results / "x.csv").write_text("a,b\n")
    assert folder.report("--check") == 2
    assert "x.csv, line 1: missing columns: suite, case, " in capsys.readouterr().err
    (folder.results / "x.csv").unlink()
    (folder.results / "compiled.csv").write_text("a,b\n")
    assert folder.report("--check") == 2
    assert "compiled.csv, line 1: missing columns: kernel, " in capsys.readouterr().err
    (folder.results / "compiled.csv").unlink()
    assert main(["report", "--results", str(folder.results / "none")]) == 2
    assert folder.report("--what") == 2
    assert folder.report("--check") == 2  # there is no page
    assert capsys.readouterr().err.count("error: ") == 3
