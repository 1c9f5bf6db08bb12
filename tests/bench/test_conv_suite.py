"""The suite conv: the networks' own convolutions, their providers, who wins."""

import pytest
import torch

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.machine import measure_machine
from emanet_triton.bench.measure import measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row, read_rows
from emanet_triton.bench.suites import conv, conv_bottleneck
from emanet_triton.kernels.cost import Cost

SIZE = 512, 1024


def test_every_convolution_of_the_networks_is_found():
    r50, r101 = conv.layers("r50", SIZE), conv.layers("r101", SIZE)
    assert set(r50) == set(r101)
    assert r50.total() == 3 + 16 * 3 + 4 + 4  # stem, blocks, projections, head
    assert r101.total() == 3 + 33 * 3 + 4 + 4
    layer3 = conv.Layer(3, 256, 256, 64, 128, 1, 2, residual=False, relu=True)
    assert (r50[layer3], r101[layer3]) == (5, 22)
    assert sum(count for layer, count in r50.items() if layer.residual) == 16
    assert sum(count for layer, count in r50.items() if not layer.relu) == 5


def test_a_short_run_takes_the_heaviest():
    names = [case.name for case in conv.cases(Selection(quick=True))]
    assert len(names) == conv.QUICK_LAYERS
    assert names[0].startswith("3x3 C=2048 O=512")
    assert "r50=5 r101=22" in " ".join(names)


def test_a_layer_reads_as_words_and_numbers():
    layer = conv.Layer(1, 64, 256, 128, 256, 2, 1, residual=True, relu=True)
    assert str(layer) == "1x1 C=64 O=256 H=128 W=256 stride=2 dilation=1 residual relu"


def test_winograd_takes_3x3_of_stride_1_only():
    names = {
        layer: conv._providers(Selection(), layer, torch.float32)
        for layer in conv.layers("r50", SIZE)
    }
    for layer, providers in names.items():
        assert ("winograd" in providers) == (layer.kernel == 3 and layer.stride == 1)


@pytest.mark.parametrize("name", ["torch", "onednn", "winograd", "triton"])
def test_providers_agree_call_after_call(name):
    layer = conv.Layer(3, 16, 16, 5, 7, 1, 2, residual=True, relu=True)
    problem = conv.make_problem(layer, 2, torch.float32, "cpu")
    before = problem.residual.clone()
    assert conv.relative_error(conv.provide(name, lambda: problem)(), problem.exact()) < 3e-6
    if name != "torch":
        assert torch.equal(problem.residual, before)


def test_the_bottlenecks_of_layers_1_and_2():
    found = conv_bottleneck.blocks("r50", SIZE)
    assert found == {
        conv_bottleneck.Block(64, 64, 128, 256, True): 1,
        conv_bottleneck.Block(256, 64, 128, 256, False): 2,
        conv_bottleneck.Block(512, 128, 64, 128, False): 3,
    }


def test_floor_of_a_bottleneck():
    block = conv_bottleneck.Block(64, 64, 2, 3, True)
    weights = 64 * 64 + 9 * 64 * 64 + 64 * 256
    assert block.floor(1, 2) == Cost(
        2 * (6 * (64 + 256 + 256) + weights + 64 + 64 + 256), 2 * 6 * weights
    )


def test_bottlenecks_pass_their_gate():
    block = conv_bottleneck.Block(64, 64, 3, 4, True)
    selection = Selection(providers=("torch", "separate", "triton"))
    case = conv_bottleneck.make_case(selection, block, 1, "fp16", "r50=1 r101=1")
    rows = measure(case, Method(rounds=3, seconds=0.1), measure_machine("cpu", ["fp16"], True))
    assert [(row.provider, row.gate) for row in rows] == [
        ("torch", "passed"),
        ("separate", "passed"),
        ("triton", "passed"),
    ]


def row(case, provider, p50, floor, gate="passed"):
    timed = gate == "passed"
    return Row(
        *("conv", case, provider, gate),
        p50_ms=p50 if timed else None,
        floor_ms=floor,
        x_floor=p50 / floor if timed else None,
        dtype="bf16",
    )


def test_the_summary_names_winners_and_puts_the_worst_first():
    near, far = "3x3 C=1 B=1 bf16 r50=1 r101=1", "1x1 C=2 B=1 bf16 r50=5 r101=22"
    rows = [
        row(near, "torch", 4.0, 1.0),
        row(near, "cudnn", 1.5, 1.0),
        row(near, "triton", 0.1, 1.0, gate="failed: error"),
        row(far, "torch", 9.0, 1.0),
        row(far, "triton", 3.0, 1.0),
        row("bottleneck C=1 bf16 r50=1 r101=1", "torch", 2.0, 1.0),
    ]
    lines = conv.summary(rows).splitlines()
    winners = [line.split()[0] for line in lines[2:5]]
    assert winners == ["triton", "torch", "cudnn"]
    assert lines[2].split()[1:4] == ["3", "1", "3.00"]
    assert lines[5:] == [
        "these in r50, bf16: torch 49 ms, the fastest of each 16.5 ms, floor 6 ms",
        "these in r101, bf16: torch 202 ms, the fastest of each 67.5 ms, floor 23 ms",
    ]


def test_a_tiny_run(tmp_path, capsys):
    path = tmp_path / "conv.csv"
    assert main(["conv", "--tiny", "--threads", "1", "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert len({row.case for row in rows}) == 29
    assert all(row.gate == "passed" and row.floor_ms > 0 for row in rows)
    assert "these in r101, fp32: " in capsys.readouterr().out
