"""The benchmark scripts where there is no GPU: their peers, gate, statistics and rows."""

import csv
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emanet_triton.kernels.cost import Shape
from emanet_triton.models.head import EMAHead

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
em_common, em_cpu, em_gpu = map(importlib.import_module, ("em_common", "em_cpu", "em_gpu"))


@pytest.fixture
def problem():
    return em_common.make_problem(2, (3, 7), 16, 5, dtype=torch.float64)


def test_mmsegs_operations_are_the_heads():
    problem = em_common.make_problem(2, (3, 7), 16, 5, dtype=torch.float32)
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
        got, _ = em_common.mmseg_block(problem)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_mmsegs_operations_equal_the_specification(problem):
    got = em_common.mmseg_block(problem)
    for image in range(2):
        assert em_common.relative_error(got, em_common.float64_block(problem, image), image) < 1e-12


def test_problems_repeat_and_differ_by_seed(problem):
    again = em_common.make_problem(2, (3, 7), 16, 5, dtype=torch.float64)
    other = em_common.make_problem(2, (3, 7), 16, 5, dtype=torch.float64, seed=1)
    assert torch.equal(problem.feats, again.feats)
    assert not torch.equal(problem.feats, other.feats)


def test_relative_error():
    want = (torch.tensor([[4.0, -8.0]]), torch.tensor([[1.0]]))
    got = (torch.tensor([[4.0, -8.0], [4.0, -6.0]]), torch.tensor([[1.0], [1.5]]))
    assert em_common.relative_error(got, want, 0) == 0
    assert em_common.relative_error(got, want, 1) == 0.5
    got[0][1, 0] = math.nan
    assert math.isnan(em_common.relative_error(got, want, 1))


@pytest.mark.parametrize(
    ("error", "plain", "passes"),
    [(2e-3, 1e-3, True), (2.1e-3, 1e-3, False), (9e-7, 0, True), (math.nan, 1, False)],
    ids=["twice", "more", "atol", "nan"],
)
def test_three_way_tolerance(error, plain, passes):
    assert em_common.passes(error, plain) is passes


def test_providers_take_turns():
    order = []
    providers = {name: lambda name=name: order.append(name) for name in "ab"}

    def clock(call):
        call()
        return len(order)

    times = em_common.alternate(providers, clock, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first round warms up
    assert times == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_summary():
    times = [i / 1e3 for i in range(1, 12)]
    row = em_common.summary(times, [2 * t for t in times])
    assert row == {"p20_ms": "3", "p50_ms": "6", "p80_ms": "9", "ratio": "2.00"}


def test_rows_are_written_under_a_new_folder(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    em_common.write_rows(path, [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": "x,y"}, {"a": "2", "b": ""}]


def test_cpu_rows(monkeypatch):
    monkeypatch.setitem(em_common.SIZES, 63, (7, 9))
    threads = torch.get_num_threads()
    rows = em_cpu.measure(63, "channels-last", [1], rounds=2)
    torch.set_num_threads(threads)
    assert [(row["provider"], row["N"], row["threads"]) for row in rows] == [
        ("mmseg", 63, 1),
        ("folded", 63, 1),
    ]
    assert all(float(row["p50_ms"]) > 0 and float(row["error"]) < 1e-5 for row in rows)


def test_gpu_rows(monkeypatch):
    """The loop of the GPU script on the CPU, with the operator's plain backend in its place."""
    monkeypatch.setattr(em_gpu, "provide", plain_provider)
    monkeypatch.setattr(em_gpu, "rotation", lambda shape: 2)
    shape = Shape(2, 63, channels=16, bases=5, dtype="fp32")
    names = ("mmseg", "triton", "wrong", "missing")
    for operation in em_gpu.OPERATIONS:
        rows = em_gpu.measure(
            operation, shape, names, 2, (1e12, 1e14), device="cpu", clock=lambda call: 1e-3
        )
        gates = {row["provider"]: row["gate"] for row in rows}
        assert gates == {
            "mmseg": "passed",
            "triton": "passed",
            "wrong": "failed: wrong values",
            "missing": "failed: RuntimeError",
        }
        assert [row["p50_ms"] for row in rows] == ["1", "1", "", ""]
        assert len({tuple(row) for row in rows}) == 1  # the same columns


def plain_provider(name, operation, problem, precision):
    if name == "missing":
        raise RuntimeError("this peer does not run")
    block = operation == "em_attention_block"
    arguments = problem.block_arguments() if block else (problem.feats, problem.bases)
    call = getattr(em_gpu.ops, operation)
    if name == "wrong":
        return lambda: [1.1 * t for t in call(*arguments, backend="torch")]
    return lambda: call(*arguments, backend="torch")


def test_figures_keep_the_forecast_apart():
    shape = Shape(1, 32768)
    times = [100e-6, 100e-6]
    row = em_gpu.figures(
        "em_attention_block", "triton", shape, times, [300e-6, 300e-6], (3.0e12, 798e12)
    )
    assert row["ratio"] == "3.00"
    assert row["floor_us"] == "58.7"
    assert row["x_floor"] == "1.70"
    assert row["gigabytes_s"] == "1762"
    assert row["predicted_us"] == "140-175"
    peer = em_gpu.figures("em_attention_block", "mmseg", shape, None, None, (3.0e12, 798e12))
    assert (peer["p50_ms"], peer["x_floor"], peer["predicted_us"]) == ("", "", "")


def test_rotated_inputs_exceed_the_caches():
    assert em_gpu.rotation(Shape(1, 8192)) == 8
    assert em_gpu.rotation(Shape(1, 131072)) == 2
    calls = em_gpu.rotate([lambda: 1, lambda: 2])
    assert [calls() for _ in range(3)] == [1, 2, 1]


def test_gpu_arguments(capsys):
    options = em_gpu.parse_arguments(["--out", "here", "--dtypes", "bf16", "--batches", "8"])
    assert (options.dtypes, options.batches, options.positions) == (
        ["bf16"],
        [8],
        [8192, 9409, 32768, 131072],
    )
    with pytest.raises(SystemExit):
        em_gpu.parse_arguments(["--out", "here", "--providers", "triton"])
    assert "--providers needs mmseg" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "em_gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: em_gpu.py measures a GPU, and PyTorch finds none here\n"


@pytest.mark.parametrize("operation", em_gpu.OPERATIONS)
def test_providers_agree(operation):
    problem = em_common.make_problem(2, (3, 7), 16, 5)
    plain, kernels = (em_gpu.provide(p, operation, problem, "ieee")() for p in ("mmseg", "triton"))
    for p, k in zip(plain, kernels, strict=True):
        torch.testing.assert_close(k, p, rtol=1e-4, atol=1e-5)
