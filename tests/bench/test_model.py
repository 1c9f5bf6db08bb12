"""The suite model: peers are mmsegmentation's operations, and all of them give its labels."""

import math
from dataclasses import replace

import pytest
import torch
from fake_runtimes import fake_openvino
from golden_data import relative_error

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.networks import architecture, make_network, make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import mmseg_network, without_gradients
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.suites import model
from emanet_triton.bench.suites.model_problem import Problem, make_image
from emanet_triton.bench.walk import Recorder
from emanet_triton.inference.segment import segment
from emanet_triton.kernels.conv.tiles import EXPAND_REDUCE_CHANNELS
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import FusedConv, fuse

SIZE = 40, 64
OPERATORS = "conv_bias_act", "expand_reduce"  # with a backend


def problem(mode="slide", resident=False):
    protocol = make_protocol(mode, SIZE, tiny=True)
    return Problem("r50", protocol, make_image(SIZE), "cpu", resident, tiny=True)


def test_mmsegs_operations_are_the_networks():
    network = make_network("r50", make_protocol("whole", SIZE), tiny=True)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = mmseg_network(network, images), network(images)
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_mmsegs_labels_are_segments(mode):
    given = problem(mode)
    network = given.model()
    with torch.no_grad():
        got = given.labels_by(network)(given.inputs())
    want = torch.from_numpy(segment(network, given.image))
    assert got.shape == (1, *SIZE)
    assert (got[0] != want).double().mean() < 1e-3
    assert want.unique().numel() > 3  # a test of labels says little where there is one


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_compiler_takes_what_makes_labels(mode):
    given = problem(mode)
    network, inputs = given.model(), given.inputs()
    compiled = torch.compile(given.finish, dynamic=False, backend="eager")
    got, want = (
        without_gradients(given.labels_by(network, finish), inputs)()
        for finish in (compiled, given.finish)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_ours_on_the_device_is_what_the_predictor_does(mode):
    fused = [model.fused(problem(mode, resident), "fp32")() for resident in (False, True)]
    assert torch.equal(*fused)


def test_the_network_alone_gives_its_logits():
    given = replace(problem("whole"), alone=True)
    network, images = given.model(), given.inputs()
    with torch.no_grad():
        want = network(images)
    for name in ("plain-fp32", "fused-fp32"):
        got = model.PROVIDERS[name](given)()
        assert (got - want).norm() <= 1e-4 * want.norm()
        assert torch.equal(model.labels_of(got), got.argmax(1))


@pytest.mark.parametrize("backend", ["auto", "cudnn", "fastest"])
def test_all_convolutions_get_a_backend_and_the_head_only_the_fastest(backend, monkeypatch):
    timed = []
    monkeypatch.setattr(model, "_timed_by", lambda fused, _: timed.append(fused))
    model.fused(problem(), "bf16", backend)
    convs = [module for module in timed[0].modules() if isinstance(module, FusedConv)]
    assert {conv.backend for conv in convs} == {backend}
    assert timed[0].decode_head.backend == ("fastest" if backend == "fastest" else "auto")


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_other_runtimes_give_the_same_labels(mode, monkeypatch):
    fake_openvino(monkeypatch)
    given = problem(mode)
    want = model.PROVIDERS["plain-fp32"](given)()
    assert torch.equal(model.PROVIDERS["openvino-fp32"](given)(), want)
    alone = replace(given, alone=True, protocol=make_protocol("whole", SIZE, tiny=True))
    want = model.PROVIDERS["plain-fp32"](alone)()
    assert torch.equal(model.PROVIDERS["openvino-fp32"](alone)(), want)


def test_networks_repeat_and_leave_the_random_numbers_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again = (problem().model().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), state)


def test_bounds_are_three_way_in_half_precision():
    assert model.bound("fused-fp32", {}) == model.LABELS_BOUND
    assert model.bound("fused-bf16", {"plain-bf16": 0.01}) == 0.02 + model.LABELS_BOUND
    assert math.isnan(model.bound("fused-bf16", {}))
    assert model.bound("fused-bf16", {}, halved=lambda: 0.01) == 0.02 + model.LABELS_BOUND
    assert model.bound("fused-bf16", {"plain-bf16": 0.03}, halved=lambda: 0.01) > 0.06


def test_convolutions_that_multiply_float32_round_as_those_of_bf16():
    given = problem("whole")
    network, changed = (given.model().bfloat16() for _ in range(2))
    model.multiply_float32(changed)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        exact, got, want = given.model()(images.float()), changed(images), network(images)
    assert got.dtype == torch.bfloat16
    wanted = relative_error(want.float(), exact)
    assert 0.5 * wanted <= relative_error(got.float(), exact) <= 2 * wanted


@pytest.mark.parametrize("has_bf16", [True, False])
def test_plain_bf16_runs_where_it_is_fast(has_bf16, monkeypatch):
    monkeypatch.setattr(model, "has_onednn", lambda dtype: has_bf16)
    for providers in (), ("fused-bf16",), ("plain-bf16",):
        case, *_ = model.cases(Selection(providers=providers, tiny=True))
        assert ("plain-bf16" in case.providers) == (has_bf16 or "plain-bf16" in providers)
    bound = case.bound("fused-bf16", {})
    assert math.isnan(bound) if has_bf16 else bound > model.LABELS_BOUND


def test_the_bound_of_8_bits_is_of_plain_with_8_bits():
    bound = model.bound("fused-int8", {"plain-bf16": 0.01}, lambda: 0.03)
    assert bound == 0.06 + model.LABELS_BOUND
    assert math.isnan(model.bound("fused-int8", {}))


def test_cases_by_device(monkeypatch):
    monkeypatch.setattr(model, "has_onednn", lambda dtype: True)  # as on a CPU with bfloat16
    cpu = list(model.cases(Selection()))
    assert [case.name for case in cpu] == [
        "r50 whole 1024x2048 from=host",
        "r50 slide 1024x2048 from=host",
        "r50 whole ms+flip 1024x2048 from=host",
        "r101 whole 1024x2048 from=host",
        "r101 slide 1024x2048 from=host",
        "r101 whole ms+flip 1024x2048 from=host",
        "r50 network 512x1024",
        "r101 network 512x1024",
        "r50 network 1024x2048",
        "r101 network 1024x2048",
    ]
    assert list(cpu[2].providers) == ["plain-fp32", "plain-bf16", "fused-fp32", "fused-bf16"]
    assert "compiled-bf16" not in cpu[0].providers
    peers = {"openvino-fp32", "openvino-bf16", "openvino-int8"}
    assert peers < set(cpu[0].providers) == set(cpu[-1].providers)
    assert peers < set(cpu[0].own_threads)
    assert "fused-int8" in set(cpu[0].providers) - set(cpu[0].own_threads)
    named = [case.name for case in model.cases(Selection(sizes=(SIZE,), networks=("r50",)))]
    assert named[3:] == ["r50 network 40x64"]
    host, device, *_ = model.cases(Selection(device="cuda"))
    assert (host.wall, device.wall) == (True, False)
    assert (host.graph, device.graph) == (False, True)
    assert not {*peers, "fused-int8"} & set(host.providers)
    assert not any("network" in case.name for case in model.cases(Selection(device="cuda")))
    (quick,) = model.cases(Selection(quick=True))
    assert "compiled-fp32" not in quick.providers
    (asked,) = model.cases(Selection(quick=True, providers=("compiled-fp32",)))
    assert list(asked.providers) == ["plain-fp32", "compiled-fp32"]
    (half,) = model.cases(Selection(quick=True, providers=("fused-bf16",)))
    assert list(half.providers) == ["plain-fp32", "plain-bf16", "fused-bf16"]


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
def test_all_convolutions_by_one_backend(backend):
    with torch.device("meta"):
        network = EMANet(architecture("r50"), make_protocol("whole", SIZE)).eval()
    fused = fuse(network, dtype=torch.bfloat16)
    fused.decode_head.backend = "triton"
    model.set_backend(fused, backend)
    with torch.inference_mode(), Recorder() as recorder:
        fused(torch.empty(1, 3, *SIZE, device="meta"))
    calls = {name: [c for c in recorder.calls if c.name == name] for name in OPERATORS}
    assert {call["backend"] for own in calls.values() for call in own} == {backend}
    channels = {
        (call["x"].shape[1], call["weights"][1].shape[0]) for call in calls["expand_reduce"]
    }
    assert channels == (set(EXPAND_REDUCE_CHANNELS) if backend == "triton" else set())


def test_one_provider_has_to_be_asked_for():
    host, *_ = model.cases(Selection(device="cuda"))
    assert not {"cudnn-bf16", "triton-bf16"} & set(host.providers)
    asked = Selection(device="cuda", providers=("cudnn-bf16", "triton-bf16"))
    host, *_ = model.cases(asked)
    assert {"cudnn-bf16", "triton-bf16"} <= set(host.providers)
    assert model.bound("cudnn-bf16", {"plain-bf16": 0.01}) == 0.02 + model.LABELS_BOUND


def test_a_tiny_run(tmp_path):
    """Of our own providers; other tests run the peers, whose networks take long to compile."""
    path = tmp_path / "model.csv"
    own = [name for name in model.PROVIDERS if name.startswith(("plain", "fused"))]
    options = "--tiny", "--threads", "1", "--csv", str(path), "--providers", *own
    assert main(["model", *options]) == 0
    rows = read_rows(path)
    assert len({row.case for row in rows}) == 4
    for row in rows:
        if row.provider.startswith(("plain", "fused-fp", "fused-bf")):
            assert row.gate == "passed"
            assert row.p50_ms > 0
        elif row.gate != "passed":
            assert row.gate.startswith("absent: ")
            assert row.p50_ms is None
