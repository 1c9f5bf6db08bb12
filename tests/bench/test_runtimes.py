"""Other runtimes run the network, or say why they cannot."""

import sys
from types import ModuleType

import pytest
import torch

from emanet_triton.bench import runtimes
from emanet_triton.bench.case import Absent
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import mmseg_network
from emanet_triton.bench.suites import model


@pytest.fixture
def network():
    return make_network("r50", make_protocol("slide", (40, 64), tiny=True), tiny=True)


def test_what_does_not_import_is_absent_with_the_reason(monkeypatch):
    with pytest.raises(Absent, match="ModuleNotFoundError: No module named 'not_a_package'"):
        runtimes.import_peer("not_a_package")


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
    monkeypatch.setattr(model, "make_network", build)
    monkeypatch.setattr(torch.onnx, "export", build)
    case = next(model.cases(Selection("cuda", tiny=True)))
    with pytest.raises(Absent) as absent:
        case.providers[provider]()
    assert str(absent.value) == reason


def test_tensorrt_needs_a_gpu():
    with pytest.raises(Absent, match="Torch-TensorRT needs a GPU"):
        runtimes.tensorrt("cpu")


def test_onnxruntime(network):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    example, other = torch.randn(2, 1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    forward = runtimes.onnxruntime("cpu")(runtimes.LogitsOnly(network), example)
    with torch.no_grad():
        want = mmseg_network(network, other)
    assert (forward(other) - want).norm() <= 1e-4 * want.norm()
