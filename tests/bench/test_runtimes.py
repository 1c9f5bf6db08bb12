"""Other runtimes run the network, or say why they cannot."""

import sys
from types import ModuleType

import pytest
import torch
from fake_runtimes import fake_openvino
from torch import nn

from emanet_triton.bench import runtimes
from emanet_triton.bench.case import Absent
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import mmseg_network
from emanet_triton.bench.suites import model, model_problem


@pytest.fixture
def network():
    return make_network("r50", make_protocol("slide", (40, 64), tiny=True), tiny=True)


def test_what_does_not_import_is_absent_with_the_reason(monkeypatch):
    with pytest.raises(Absent, match="ModuleNotFoundError: No module named 'not_a_package'"):
        runtimes.import_peer("not_a_package")


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        ("openvino-fp32", "openvino"),
        ("openvino-bf16", "onnxscript"),
        ("onnxruntime-fp32", "onnxruntime"),
        ("onnxruntime-fp32", "onnxscript"),
    ],
)
def test_what_can_be_installed_is_absent_with_the_command(provider, package, monkeypatch):
    fake_openvino(monkeypatch)
    pretend(monkeypatch, "onnxruntime", get_available_providers=lambda: ["CPUExecutionProvider"])
    assert runtimes.RUNTIMES[provider]("cpu")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Absent, match=rf"{package} .*; pip install '\.\[peers\]'$"):
        runtimes.RUNTIMES[provider]("cpu")


def test_openvino_says_where_it_cannot_run(monkeypatch):
    fake = fake_openvino(monkeypatch)
    fake.capabilities = ["FP32", "INT8"]
    with pytest.raises(Absent, match="OpenVINO finds no bf16 instructions on this CPU"):
        runtimes.openvino("bf16", "cpu")
    with pytest.raises(Absent, match="OpenVINO needs a CPU"):
        runtimes.openvino("fp32", "cuda")
    assert runtimes.openvino("fp32", "cpu")


@pytest.mark.parametrize(("dtype", "hint"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_gets_the_dtype_and_pytorchs_threads(dtype, hint, monkeypatch):
    fake = fake_openvino(monkeypatch)
    runtimes.openvino(dtype, "cpu")(nn.Identity(), torch.zeros(2))
    (compiled,) = fake.compiled
    assert compiled.settings == {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }


class Difference(nn.Module):
    def forward(self, a, b):
        return a - b


def test_openvino_reads_and_writes_the_memory_of_tensors(monkeypatch):
    fake_openvino(monkeypatch)
    examples = torch.zeros(2, 20, 20)
    forward = runtimes.openvino("fp32", "cpu")(Difference(), *examples)
    a, b = torch.randn(2, 40, 40)[:, 10:30, 10:30]  # windows, of which it needs copies
    first, second = forward(a, b), forward(b, a)
    assert torch.equal(first, a - b)  # the second call does not overwrite it
    assert torch.equal(second, b - a)


def pretend(monkeypatch, name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("onnxruntime-fp32", "onnxruntime has no CUDAExecutionProvider"),
        (
            "tensorrt-bf16",
            "ModuleNotFoundError: import of torch_tensorrt halted; None in sys.modules",
        ),
    ],
)
def test_nothing_is_built_for_a_runtime_that_is_not_there(monkeypatch, provider, reason):
    def build(*_, **__):
        pytest.fail("a network was built")

    pretend(monkeypatch, "onnxruntime", get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    monkeypatch.setattr(model_problem, "make_network", build)
    monkeypatch.setattr(torch.onnx, "export", build)
    case = next(model.cases(Selection("cuda", tiny=True)))
    with pytest.raises(Absent) as absent:
        case.providers[provider]()
    assert str(absent.value) == reason


def test_tensorrt_needs_a_gpu():
    with pytest.raises(Absent, match="Torch-TensorRT needs a GPU"):
        runtimes.tensorrt("cpu")


@pytest.mark.parametrize("name", ["onnxruntime-fp32", "openvino-fp32"])
def test_an_installed_runtime_gives_the_logits(network, name):
    pytest.importorskip(name.partition("-")[0])
    pytest.importorskip("onnxscript")
    example, other = torch.randn(2, 1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    forward = runtimes.RUNTIMES[name]("cpu")(runtimes.LogitsOnly(network), example)
    with torch.no_grad():
        want = mmseg_network(network, other)
    assert (forward(other) - want).norm() <= 1e-4 * want.norm()
