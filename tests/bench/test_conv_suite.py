"""The suite conv: the networks' own convolutions, their providers, and their sums."""

import re

import pytest
import torch
from device import DEVICE
from fake_runtimes import fake_openvino

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.case import Absent
from emanet_triton.bench.cost import ConvShape, Cost
from emanet_triton.bench.machine import measure_machine
from emanet_triton.bench.measure import measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row, read_rows
from emanet_triton.bench.suites import conv, conv_expand_reduce, conv_layers, conv_sums
from emanet_triton.bench.suites.conv_case import MOST_ERROR, bound, relative_error

SIZE = 512, 1024


def shape(dtype=torch.float32, residual=None, out=None, **changes):
    sizes = {
        "batch": 1,
        "channels": 16,
        "height": 5,
        "width": 7,
        "outputs": 16,
        "kernel": 3,
        "stride": 1,
        "dilation": 2,
    }
    return ConvShape(
        **(sizes | changes), dtype=dtype, residual=residual, out_dtype=out or dtype, relu=True
    )


def cases(**selection):
    return {case.name: case for case in conv.cases(Selection(**selection))}


def test_every_convolution_of_the_fused_networks_is_found():
    calls = conv_layers.walks(Selection(), SIZE, 1, "fp32")
    r50, r101 = (conv_layers.layers(calls[name]) for name in ("r50-whole", "r101-whole"))
    assert set(calls) == {"r50-whole", "r101-whole"}  # the sliding window on a GPU only
    assert set(r50) == set(r101)
    assert r50.total() == 3 + 16 * 3 + 4 + 4  # stem, blocks, projections, head
    assert r101.total() == 3 + 33 * 3 + 4 + 4
    middle = shape(channels=256, outputs=256, height=64, width=128)
    assert (r50[conv_layers.Layer(middle)], r101[conv_layers.Layer(middle)]) == (5, 22)
    assert sum(count for layer, count in r50.items() if layer.shape.residual) == 16 + 1
    assert sum(count for layer, count in r50.items() if not layer.shape.relu) == 4 + 1 + 1


def test_the_heads_convolutions_are_the_fused_ones():
    names = cases(dtypes=("bf16",))
    assert (
        "3x3 C=2048 O=768 H=64 W=128 stride=1 dilation=1 out=fp32 B=1 bf16 "
        + ("r50-whole=1 r101-whole=1")
        in names
    )
    assert (
        "3x3 C=256 O=256 H=64 W=128 stride=1 dilation=1 residual=fp32 pitch=768 relu B=1 "
        + ("bf16 r50-whole=1 r101-whole=1")
        in names
    )
    assert not any("O=512" in name and "C=2048" in name and "3x3" in name for name in names)


def test_a_gpu_runs_the_windows_of_the_sliding_mode_as_one_batch():
    names = cases(device="cuda", dtypes=("bf16",))
    assert (
        "1x1 C=1024 O=256 H=97 W=97 stride=1 dilation=1 relu B=8 bf16 "
        + ("r50-slide=5 r101-slide=22")
        in names
    )
    assert "expand-reduce P=64 O=256 R=64 H=193 W=193 B=8 bf16 r50-slide=2 r101-slide=2" in names
    assert sum("slide" in name for name in names) == sum("whole" in name for name in names) == 36


def test_the_networks_asked_for_do_not_change_the_names():
    every, some = cases(), cases(networks=("r101",))
    assert list(some) == list(every)


def test_a_short_run_takes_the_heaviest():
    names = [case.name for case in conv.cases(Selection(quick=True))]
    assert len(names) == conv.QUICK_LAYERS
    assert names[0].startswith("3x3 C=2048 O=768")
    assert "r50-whole=5 r101-whole=22" in " ".join(names)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (
            conv.Layer(shape(kernel=1, outputs=64, stride=2, residual=torch.float32), 64),
            "1x1 C=16 O=64 H=5 W=7 stride=2 dilation=2 residual relu B=1 fp32",
        ),
        (
            conv.Layer(shape(torch.bfloat16, torch.float32, torch.float32), 48),
            "3x3 C=16 O=16 H=5 W=7 stride=1 dilation=2 residual=fp32 pitch=48 relu out=fp32 "
            "B=1 bf16",
        ),
    ],
    ids=["plain", "mixed"],
)
def test_a_layer_reads_as_words_and_numbers(layer, name):
    assert str(layer) == name


def test_providers_of_a_gpu():
    found = cases(device="cuda", dtypes=("bf16", "fp32"))
    by_gluon = set()
    for name, case in found.items():
        names = ["torch", "compiled", "cudnn", "cudnn-benchmark", "triton"]
        names += ["triton-tf32x3"] if case.dtype == "fp32" else []
        if case.dtype == "bf16" and re.search(r"C=(64|128|256|512|1024|2048) .*stride=1 ", name):
            names += [] if "O=19" in name else ["gluon"]
            by_gluon.add(name)
        assert list(case.providers) == (
            list(conv_expand_reduce.PROVIDERS) if "expand-reduce" in name else names
        )
        assert case.graph
    assert len(by_gluon) > 20


def test_gluon_is_absent_without_a_hopper_gpu():
    layer = conv_layers.Layer(shape(torch.bfloat16, channels=64))
    with pytest.raises(Absent, match=r"on an NVIDIA Hopper GPU, got torch\.bfloat16 on cpu"):
        conv.provide("gluon", lambda: conv.make_problem(layer, "cpu"))


def test_winograd_takes_3x3_of_stride_1_only_and_onednn_one_dtype():
    calls = conv_layers.walks(Selection(), SIZE, 1, "bf16")["r50-whole"]
    for layer in conv_layers.layers(calls):
        names = conv.names(Selection(), layer)
        assert names[-1] == "openvino-bf16"
        assert ("winograd" in names) == (layer.shape.kernel == 3 and layer.shape.stride == 1)
        mixed = layer.shape.outputs == 768 or layer.shape.residual == torch.float32
        assert layer.one_dtype != mixed
        assert not (mixed and "onednn" in names)


def place_of(name):
    """Where a provider runs in a test."""
    return DEVICE if name.startswith("triton") else "cpu"


@pytest.mark.parametrize("name", ["torch", "onednn", "winograd", "triton", "triton-tf32x3"])
def test_providers_agree_call_after_call(name):
    layer = conv.Layer(shape(residual=torch.float32, batch=2), 24)
    problem = conv.make_problem(layer, place_of(name))
    before = problem.residual.clone()
    error = relative_error(conv.provide(name, lambda: problem)(), problem.exact())
    assert error < bound("fp32", name, {})
    if name != "torch":
        assert torch.equal(problem.residual, before)


@pytest.mark.parametrize("name", ["torch", "winograd", "triton"])
def test_providers_agree_on_other_dtypes_of_residual_and_output(name):
    layer = conv.Layer(shape(torch.float16, torch.float32, torch.float32), 24)
    problem = conv.make_problem(layer, place_of(name))
    got = conv.provide(name, lambda: problem)()
    assert got.dtype == torch.float32
    assert relative_error(got, problem.exact()) < MOST_ERROR["fp16"]


def test_the_residual_lies_in_memory_as_in_the_network():
    problem = conv.make_problem(conv.Layer(shape(residual=torch.float32), 24), "cpu")
    residual = problem.pitched_residual()
    assert residual.stride() == (24 * 5 * 7, 1, 24 * 7, 24)
    assert torch.equal(residual, problem.residual)


def test_tf32_does_not_pass_as_tf32x3():
    assert bound("fp32", "triton", {}) < bound("fp32", "triton-tf32x3", {}) < 2**-11 / 4


def test_the_pairs_that_one_kernel_can_compute():
    """All but those of layer 4 and the one that leads to it."""
    sizes = {"r50-whole": (1, 128, 256), "r50-slide": (2, 129, 193)}
    calls = conv_layers.walks(Selection(device="cuda"), SIZE, 1, "bf16")
    for name, (batch, *size) in sizes.items():
        small = [(side + 1) // 2 for side in size]
        assert conv_expand_reduce.pairs(calls[name]) == {
            conv_expand_reduce.Pair(batch, planes, *own, 4 * planes, reduced, torch.bfloat16): n
            for planes, own, reduced, n in (
                (64, size, 64, 2),
                (64, size, 128, 1),
                (128, small, 128, 3),
                (128, small, 256, 1),
                (256, small, 256, 5),
            )
        }


def test_float32_has_no_pair():
    calls = conv_layers.walks(Selection(device="cuda"), SIZE, 1, "fp32")
    assert not conv_expand_reduce.pairs(calls["r50-whole"])


def test_floor_of_a_pair():
    pair = conv_expand_reduce.Pair(1, 64, 2, 3, 256, 128, torch.float16)
    weights = 64 * 256 + 256 * 128
    numbers = 6 * (64 + 256 + 256 + 128) + weights + 256 + 128
    assert pair.floor() == Cost(2 * numbers, 2 * 6 * weights)


def test_pairs_pass_their_gate():
    pair = conv_expand_reduce.Pair(1, 64, 3, 4, 256, 64, torch.float16)
    selection = Selection(DEVICE, providers=("torch", "separate", "triton"))
    case = conv_expand_reduce.make_case(selection, pair, "r50-whole=1 r101-whole=1")
    machine = measure_machine(DEVICE, ["fp16"], True)
    rows = measure(case, Method(DEVICE, rounds=3, seconds=0.1), machine)
    assert [(row.provider, row.gate) for row in rows] == [
        ("torch", "passed"),
        ("separate", "passed"),
        ("triton", "passed"),
    ]


def test_the_error_of_several_outputs_is_the_worst():
    one, two = torch.ones(4), torch.full((4,), 2.0)
    assert relative_error((one, two), (one, two)) == 0
    assert relative_error((one, two), (one, one)) == relative_error((two, one), (one, one)) == 1
    assert relative_error((two * torch.nan, one), (one, one)) != 0


def row(case, provider, p50, floor, gate="passed"):
    timed = gate == "passed"
    return Row(
        *("conv", case, provider, gate),
        p50_ms=p50 if timed else None,
        floor_ms=floor,
        x_floor=p50 / floor if timed else None,
        dtype="bf16",
    )


def test_the_summary_adds_up_each_network():
    near = "3x3 C=1 B=1 bf16 r50-whole=1 r101-whole=1"
    far = "1x1 C=2 B=8 bf16 r50-whole=5 r101-slide=22"
    rows = [
        row(near, "torch", 4.0, 1.0),
        row(near, "cudnn", 1.5, 1.0),
        row(near, "triton", 0.1, 1.0, gate="failed: error"),
        row(far, "torch", 9.0, 1.0),
        row(far, "triton", 3.0, 1.0),
        row("expand-reduce P=1 bf16 r50-whole=1 r101-whole=1", "torch", 2.0, 1.0),
        row("bottleneck C=1 bf16 r50-whole=1 r101-whole=1", "torch", 2.0, 1.0),
    ]
    best = "the fastest of each"
    assert conv_sums.totals(rows).splitlines() == [
        f"6 convolutions of r50-whole, bf16: torch 49 ms, {best} 16.5 ms, floor 6 ms",
        f"1 convolutions of r101-whole, bf16: torch 4 ms, {best} 1.5 ms, floor 1 ms",
        f"22 convolutions of r101-slide, bf16: torch 198 ms, {best} 66 ms, floor 22 ms",
    ]


def test_the_summary_lists_the_convolutions_that_lose_most_time():
    uses = "r50-whole=3 r101-whole=9"
    rows = []
    for i in range(1, 15):
        case = f"1x1 C={i} B=1 bf16 {uses}"
        rows += [row(case, "torch", 9.0, 1.0), row(case, "onednn", 1 + i / 4, 1.0)]
        rows += [row(case, "openvino-bf16", 0.5, 1.0), row(case, "compiled", 0.5, 1.0)]
    rows += [row(f"3x3 C=1 B=1 bf16 {uses}", "torch", 9.0, 1.0)]
    rows += [row(f"3x3 C=1 B=1 bf16 {uses}", "winograd", 0.5, 1.0)]  # below the floor
    said = conv_sums.losses(rows).splitlines()
    assert said[0] == "time above the floor in r50-whole, bf16:"
    assert said[1] == ("10.5 ms in 3 runs of 1x1 C=14 B=1 bf16: 4.5 ms by onednn, floor 1 ms")
    assert [line.split()[0] for line in said[1:]] == [f"{3 * i / 4:g}" for i in range(14, 3, -1)]
    assert conv_sums.summary(rows).splitlines()[2:] == said  # after the sums of two networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("residual", [None, torch.float32], ids=["alone", "residual"])
def test_other_runtimes_run_the_same_convolution(dtype, residual, monkeypatch):
    fake_openvino(monkeypatch)
    layer = conv.Layer(shape(dtype, residual, residual), 24)
    problem = conv.make_problem(layer, "cpu")
    (name,) = [n for n in conv.names(Selection(), layer) if n.startswith("openvino")]
    got = conv.provide(name, lambda: problem)()
    assert got.dtype == layer.shape.out_dtype
    assert relative_error(got, problem.exact()) < MOST_ERROR[name.partition("-")[2]]


def test_a_tiny_run(tmp_path, capsys):
    path = tmp_path / "conv.csv"
    own = ["torch", "onednn", "winograd"]  # test_runtimes has the other runtimes
    command = ["conv", "--tiny", "--threads", "1", "--csv", str(path), "--providers", *own]
    assert main(command) == 0
    rows = read_rows(path)
    assert len({row.case for row in rows}) == 29
    assert all(row.gate == "passed" and row.floor_ms > 0 for row in rows)
    assert "59 convolutions of r50-whole, fp32: " in capsys.readouterr().out
