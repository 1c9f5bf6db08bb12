"""The suite eval: from files to the metric, and which part of it is the limit."""

import pytest
import torch

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row, read_rows
from emanet_triton.bench.suites import eval as suite


def test_a_tiny_run(tmp_path, capsys):
    assert main(["eval", "--tiny", "--rounds", "3", "--csv", str(tmp_path / "rows.csv")]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row.provider for row in rows] == ["evaluation", "decoding alone", "network alone"]
    assert all(row.gate == "passed" and row.p50_ms > 0 for row in rows)
    assert "is the limit" in capsys.readouterr().out


def test_generated_images_and_weights():
    selection = Selection(tiny=True, networks=("r50",))
    (case,) = suite.cases(selection)
    assert case.name == "r50 64x128 images=4 fp32"
    problem = suite._generated("r50", (64, 128), 2)
    assert len(problem.samples) == 2
    labels = suite._decode(problem.samples)
    assert 0 < labels.sum() <= 2 * 64 * 128
    model = problem.load("cpu")
    assert len(model.backbone.layer3) == 6


def test_the_gate():
    want = torch.tensor([[90, 10], [0, 100]])
    assert suite._error(want, want) == 0
    assert suite._error(want.sum(1), want) == 0
    moved = torch.tensor([[89, 11], [0, 100]])
    assert suite._error(moved, want) == pytest.approx(1 / 200)


def row(provider, ms):
    return Row("eval", "emanet_demo 256x512 images=40 fp32", provider, "passed", p50_ms=ms)


@pytest.mark.parametrize(("network", "limit"), [(800.0, "network"), (100.0, "decoder")])
def test_the_summary_says_what_the_limit_is(network, limit):
    rows = [row("evaluation", 1000.0), row("decoding alone", 200.0), row("network alone", network)]
    text = suite.summary(rows)
    assert text.startswith("emanet_demo 256x512 images=40 fp32: 40 images/s; decoding alone")
    assert "takes 20% of that time" in text
    assert text.endswith(f"the {limit} is the limit")
    assert suite.summary(rows[:1]).endswith("40 images/s")
    assert suite.summary(rows[1:]) == ""


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (Selection(), ["emanet_demo 256x512 images=40 fp32"]),
        (Selection(quick=True), ["emanet_demo 256x512 images=8 fp32"]),
        (
            Selection("cuda"),
            ["emanet_demo 256x512 images=40 fp32", "r50 1024x2048 images=16 fp32"],
        ),
        (Selection(networks=("r101",), sizes=((512, 1024),)), ["r101 512x1024 images=4 fp32"]),
    ],
)
def test_what_is_selected(selection, names):
    assert [case.name for case in suite.cases(selection)] == names
