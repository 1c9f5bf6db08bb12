"""The suite em: its peers are mmseg's operations, and its gate compares with float64."""

import math

import pytest
import torch
from device import DEVICE
from subnormal import count_subnormal

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.case import Absent
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.suites import em
from emanet_triton.models.head import EMAHead


@pytest.fixture
def problem():
    return em.make_problem(2, (3, 7), 16, 5, dtype=torch.float64)


def test_mmsegs_operations_are_the_heads():
    problem = em.make_problem(2, (3, 7), 16, 5)
    head = EMAHead(8, ema_channels=16, num_bases=5).eval()
    mid, out, norm = head.ema_mid_conv.conv, head.ema_out_conv.conv, head.ema_out_conv.bn
    with torch.no_grad():
        mid.weight.copy_(problem.mid_weight)
        mid.bias.copy_(problem.mid_bias)
        out.weight.copy_(problem.out_weight)
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        for own, value in zip(statistics, problem.bn, strict=True):
            own.copy_(value)
        head.ema_module.bases.copy_(problem.bases)
        recon = head.ema_module(head.ema_mid_conv(problem.feats))
        want = torch.relu(problem.feats + head.ema_out_conv(torch.relu(recon)))
        got, _ = em.mmseg_block(problem)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_mmsegs_operations_equal_the_specification(problem):
    got = em.mmseg_block(problem)
    assert em.worst_error(got, lambda image: em.float64("block", problem, image), 2) < 1e-12


def test_problems_repeat(problem):
    again = em.make_problem(2, (3, 7), 16, 5, dtype=torch.float64)
    assert torch.equal(problem.feats, again.feats)


def test_relative_error():
    want = (torch.tensor([[4.0, -8.0]]), torch.tensor([[1.0]]))
    got = (torch.tensor([[4.0, -8.0], [4.0, -6.0]]), torch.tensor([[1.0], [1.5]]))
    assert em.relative_error(got, want, 0) == 0
    assert em.relative_error(got, want, 1) == 0.5
    assert em.worst_error(got, lambda image: want, 2) == 0.5
    got[0][1, 0] = math.nan
    assert math.isnan(em.relative_error(got, want, 1))
    assert math.isnan(em.worst_error(got, lambda image: want, 2))


def test_three_way_tolerance():
    assert em.three_way("triton", {"mmseg": 1e-3}) == pytest.approx(2e-3, rel=1e-2)
    assert em.three_way("triton", {"mmseg": 0.0}) > 0
    assert not em.three_way("triton", {}) > 0  # without a peer nothing passes


@pytest.mark.parametrize("operation", em.FLOORS)
def test_providers_agree(operation):
    problem = em.make_problem(2, (3, 7), 16, 5, device=DEVICE)
    results = [
        em.provide(p, operation, lambda: problem)() for p in ("mmseg", "ours-torch", "triton")
    ]
    for plain, *ours in zip(*results, strict=True):
        for own in ours:
            torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_peers_are_compiled_on_a_cpu_unless_the_run_is_short():
    assert all("mmseg-compiled" in case.providers for case in em.cases(Selection()))
    assert not any("mmseg-compiled" in case.providers for case in em.cases(Selection(quick=True)))


def test_peers_are_compiled_on_a_gpu_if_asked_for_and_at_one_case():
    compiled = {
        case.name: list(case.providers)
        for case in em.cases(Selection(device="cuda"))
        if "mmseg-compiled" in case.providers
    }
    assert compiled == {
        "block B=1 N=32768 bf16 channels-last": [
            *("mmseg", "mmseg-compiled", "ours-torch", "triton", "one-pass-128", "one-pass-16")
        ]
    }
    asked = em.cases(Selection(device="cuda", providers=("mmseg-compiled",)))
    assert all(list(case.providers) == ["mmseg", "mmseg-compiled"] for case in asked)


def test_a_cpu_runs_both_dtypes_and_layouts():
    names = {case.name for case in em.cases(Selection())}
    for dtype in ("fp32", "bf16"):
        for layout in em.LAYOUTS:
            assert f"block B=1 N=32768 {dtype} {layout}" in names


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_of_logits_that_spread(device):
    names = {case.name for case in em.cases(Selection(device=device))}
    assert "attention B=1 N=8192 fp32 channels-last spread" in names
    assert "block B=1 N=8192 bf16 channels-last spread" in names


def test_logits_spread_over_hundreds():
    small = em.cases(Selection(sizes=((64, 96),), dtypes=("fp32",)))
    (case,) = (c for c in small if c.name.startswith("attention") and c.name.endswith("spread"))
    problem = case.prepare()
    logits = problem.feats.flatten(2).mT @ problem.bases
    assert logits.max() - logits.min() > 300
    assert count_subnormal(torch.softmax(logits, 2)) > 10
    exact = em.float64("attention", problem)
    errors = {
        name: em.relative_error(em.provide(name, "attention", lambda: problem)(), exact)
        for name in ("mmseg", "ours-torch")
    }
    assert errors["ours-torch"] <= em.three_way("ours-torch", errors)


def test_graph_replays_are_timed():
    assert all(case.graph for case in em.cases(Selection(device="cuda")))


def test_sizes_are_of_images():
    names = [case.name for case in em.cases(Selection(sizes=((769, 769),)))]
    assert len(names) >= 4
    assert all("N=9409" in name for name in names)


def test_a_tiny_run(tmp_path):
    path = tmp_path / "em.csv"
    assert main(["em", "--tiny", "--threads", "1", "--csv", str(path)]) == 0
    rows = read_rows(path)
    providers = [row.provider for row in rows if row.case.startswith(("attention", "block"))]
    assert providers == ["mmseg", "ours-torch"] * 2
    assert all(row.gate == "passed" and row.p50_ms > 0 and row.x_floor > 0 for row in rows)
    assert all(row.error <= row.bound < 1e-5 for row in rows)


def test_one_pass_is_absent_without_a_hopper_gpu():
    problem = em.make_problem(1, (2, 3), dtype=torch.bfloat16)
    with pytest.raises(Absent, match="needs float16 or bfloat16 on an NVIDIA Hopper GPU"):
        em.provide("one-pass-16", "block", lambda: problem)
