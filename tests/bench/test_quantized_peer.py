"""OpenVINO in 8 bits: what is quantized, from which ranges, and the gate."""

import functools
import sys
from types import ModuleType

import pytest
import torch
from fake_runtimes import fake_openvino
from torch import nn

from emanet_triton.bench import quantized_peer, runtimes
from emanet_triton.bench.case import Absent
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.suites import model
from emanet_triton.bench.suites.model_problem import Problem, make_image

NAME = "openvino-int8"
SIZE = 40, 64
MACHINE = Machine("A processor", 1, "", "2.15", "3.9", "abc", "2026-11-23", None, {}, None)


@pytest.fixture
def fake(monkeypatch):
    """OpenVINO without ONNX Runtime's quantization: the network stays in float32."""
    for name in quantized_peer.TOOLS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = fake_openvino(monkeypatch)
    module.examples = []

    def quantized(model_file, examples):
        module.examples += examples
        return model_file

    monkeypatch.setattr(quantized_peer, "quantized", quantized)
    return module


@pytest.mark.parametrize("package", ["openvino", "onnxscript", *quantized_peer.TOOLS])
def test_it_is_absent_with_the_command_and_nothing_is_built(package, fake, monkeypatch):
    case = next(model.cases(Selection(tiny=True, providers=(NAME,))))
    monkeypatch.setattr(Problem, "model", lambda _: pytest.fail("a network was built"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Absent, match=rf"{package} .*; pip install '\.\[peers\]'$"):
        case.providers[NAME]()


def test_it_needs_a_cpu(fake):
    with pytest.raises(Absent, match="OpenVINO needs a CPU"):
        quantized_peer.openvino_int8("cuda")


@pytest.mark.parametrize(("capabilities", "hint"), [(["BF16", "INT8"], "bf16"), (["INT8"], "f32")])
def test_the_rest_is_bf16_where_the_cpu_has_it(capabilities, hint, fake):
    fake.capabilities = capabilities
    quantized_peer.openvino_int8("cpu")(nn.Identity(), [torch.zeros(2)])
    (compiled,) = fake.compiled
    assert compiled.settings["INFERENCE_PRECISION_HINT"] == hint
    assert compiled.settings["INFERENCE_NUM_THREADS"] == torch.get_num_threads()


@pytest.mark.parametrize(("mode", "windows"), [("whole", 1), ("slide", 6)])
def test_the_ranges_come_from_all_windows_of_the_image(mode, windows, fake):
    protocol = make_protocol(mode, SIZE, tiny=True)
    problem = Problem("r50", protocol, make_image(SIZE), "cpu", resident=False, tiny=True)
    got = model.PROVIDERS[NAME](problem)()
    assert torch.equal(got, model.PROVIDERS["plain-fp32"](problem)())
    own = list(problem.windows(problem.inputs()))
    assert len(fake.examples) == len(own) == windows
    assert all(map(torch.equal, fake.examples, own))


def need_packages():
    for name in ("openvino", "onnxscript", *quantized_peer.TOOLS):
        pytest.importorskip(name)


def test_inputs_are_unsigned_and_weights_have_a_scale_for_each_channel():
    need_packages()
    import onnx
    from onnx import numpy_helper

    conv = nn.Conv2d(3, 4, 1)
    examples = torch.rand(2, 1, 3, 5, 7) * torch.tensor([1.0, 3]).view(2, 1, 1, 1, 1) - 0.5
    exported = runtimes.exported(conv, examples[0])
    graph = onnx.load_from_string(quantized_peer.quantized(exported, examples)).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    inputs = {node.output[0]: node.input for node in graph.node}
    (read,) = (node.input for node in graph.node if node.op_type == "Conv")
    _, step, zero = inputs[read[0]]
    assert constants[zero].dtype == "uint8"
    largest, smallest = examples.max().item(), examples.min().item()
    assert constants[step] == pytest.approx((largest - smallest) / 255)
    weight, steps, _ = (constants[name] for name in inputs[read[1]])
    assert weight.dtype == "int8"
    want = conv.weight.detach()[..., 0, 0]
    assert steps == pytest.approx((want.abs().amax(1) / 127).numpy(), rel=0.01)
    assert abs(steps[:, None] * weight[..., 0, 0] - want.numpy()).max() <= steps.max()


def test_a_range_that_is_too_small_fails_its_gate(monkeypatch):
    need_packages()
    exported = functools.cache(runtimes.exported)
    quantized = quantized_peer.quantized
    network = make_network("r50", make_protocol("slide", SIZE, tiny=True), tiny=True)
    logits = runtimes.LogitsOnly(network).eval()
    window = torch.zeros(1, 3, 33, 33)
    monkeypatch.setattr(runtimes, "exported", lambda *_: exported(logits, window))
    case = next(
        c for c in model.cases(Selection(tiny=True, providers=(NAME,))) if "slide" in c.name
    )

    def row_with_ranges(factor):
        monkeypatch.setattr(
            quantized_peer,
            "quantized",
            lambda file, own: quantized(file, [factor * x for x in own]),
        )
        _, row = measure(case, Method(rounds=1), MACHINE)
        assert row.provider == NAME
        return row

    row = row_with_ranges(1)
    assert row.gate == "passed"
    assert 0 < row.error <= row.bound < 0.2
    row = row_with_ranges(0.25)
    assert row.gate.startswith("failed: error ")
    assert row.p50_ms is None
