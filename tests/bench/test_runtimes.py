"""Networks in the hands of others, or the reason why they are not."""

import sys
from types import ModuleType, SimpleNamespace

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


def test_mmsegmentation_1_is_absent(monkeypatch, network):
    pretend(monkeypatch, "mmseg", __version__="1.2.2")
    with pytest.raises(Absent, match=r"0\.x is needed, 1\.2\.2 is installed"):
        runtimes.mmsegmentation(network, "cpu")


def test_mmsegmentation_gets_our_sizes_and_weights(monkeypatch, network):
    """Its ``simple_test`` stands in here; the real one was run by hand."""
    seen = {}

    class Segmentor(torch.nn.Module):
        def load_state_dict(self, state):
            seen["state"] = state

        def simple_test(self, inputs, metas):
            seen["meta"] = metas[0]
            return [torch.zeros(40, 64, dtype=torch.int64).numpy()]

    def build_segmentor(config):
        seen["config"] = config
        return Segmentor()

    pretend(monkeypatch, "mmseg", __version__="0.30.0")
    pretend(monkeypatch, "mmseg.models", build_segmentor=build_segmentor)
    pretend(monkeypatch, "mmcv", ConfigDict=dict)
    labels = runtimes.mmsegmentation(network, "cpu")(torch.zeros(1, 3, 41, 65), (64, 40))
    assert labels.shape == (1, 40, 64)
    assert seen["meta"]["ori_shape"] == (40, 64, 3)
    assert seen["meta"]["img_shape"] == (41, 65, 3)
    assert list(seen["state"]) == list(network.state_dict())
    config = SimpleNamespace(**seen["config"])
    assert config.backbone["depth"] == 50
    assert config.decode_head["in_channels"] == network.decode_head.ema_in_conv.conv.in_channels
    assert config.auxiliary_head["in_channels"] == network.auxiliary_head.convs[0].conv.in_channels
    assert config.test_cfg == {"mode": "slide", "crop_size": (33, 33), "stride": (17, 17)}


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("onnxruntime", "onnxruntime has no CUDAExecutionProvider"),
        ("tensorrt", "ModuleNotFoundError: import of torch_tensorrt halted; None in sys.modules"),
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
