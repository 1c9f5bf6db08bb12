"""The suite post: its gate, and its providers."""

import math

import pytest
import torch
from device import DEVICE

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.suites import post


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms+flip"])
def test_providers_agree(mode, ms_flip):
    protocol = make_protocol(mode, (24, 40), tiny=True)
    problem = post.make_problem(protocol, ms_flip, (24, 40), torch.float32, DEVICE)
    exact = post.clear_labels(problem)
    slow = ms_flip and DEVICE == "cpu"  # in the interpreter
    for name in ("plain", "ours-torch") if slow else ("plain", "ours-torch", "triton"):
        got = post.provide(name, lambda: problem)()
        assert post.wrong_share(got, *exact) == 0


def test_wrong_labels_are_counted_where_they_are_clear():
    want = torch.zeros(1, 40, 50, dtype=torch.int64)
    clear = torch.ones_like(want, dtype=torch.bool)
    got = want.clone()
    assert post.wrong_share(got, want, clear) == 0
    got[0, 0, :2] = 1
    clear[0, 0, 0] = False
    assert post.wrong_share(got, want, clear) == pytest.approx(1 / 1999)
    clear[0, :20] = False
    assert math.isnan(post.wrong_share(got, want, clear))
    assert math.isnan(post.wrong_share(got[:, :3], want, clear))


def test_ours_may_get_no_clear_label_wrong():
    assert post.bound("ours-torch", {}) == post.bound("triton", {}) == 0
    assert post.bound("plain", {}) > 0


def test_the_quick_selection_is_one_case():
    assert [case.name for case in post.cases(Selection(quick=True))] == ["whole 1024x2048 fp32"]
    assert len(list(post.cases(Selection()))) == 4


def test_ms_flip_is_compiled_on_a_cpu_only_if_that_is_asked_for():
    whole, _, ms_flip, _ = post.cases(Selection())
    assert list(whole.providers) == ["plain", "plain-compiled", "ours-torch"]
    assert list(ms_flip.providers) == ["plain", "ours-torch"]
    *_, asked = post.cases(Selection(providers=("plain-compiled",)))
    assert list(asked.providers) == ["plain", "plain-compiled"]
    *_, on_a_gpu = post.cases(Selection(device="cuda"))
    assert "plain-compiled" in on_a_gpu.providers


def test_graph_replays_are_timed():
    assert all(case.graph for case in post.cases(Selection(device="cuda")))


def test_on_a_gpu_logits_are_of_the_networks_dtype_too():
    found = [case.name for case in post.cases(Selection(device="cuda"))]
    assert found == [
        f"{what} 1024x2048 {dtype}"
        for dtype in ("bf16", "fp32")
        for what in ("whole", "slide", "whole ms+flip", "slide ms+flip")
    ]


@pytest.mark.parametrize("name", ["plain", "ours-torch", "triton"])
def test_labels_of_half_precision_logits(name):
    protocol = make_protocol("slide", (24, 40), tiny=True)
    problem = post.make_problem(protocol, False, (24, 40), torch.float16, DEVICE)
    exact = post.clear_labels(problem)
    assert post.wrong_share(post.provide(name, lambda: problem)(), *exact) == 0


def test_a_tiny_run(tmp_path, monkeypatch):
    monkeypatch.setattr("emanet_triton.bench.run.peak_in_child", lambda *_: 1.5)
    path = tmp_path / "post.csv"
    assert main(["post", "--tiny", "--threads", "1", "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert [row.provider for row in rows] == ["plain", "ours-torch"] * 4
    assert all(row.gate == "passed" and row.p50_ms > 0 and row.peak_mb == 1.5 for row in rows)
