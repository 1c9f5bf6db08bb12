"""cuDNN's convolutions: what they fuse, and what runs where cuDNN has no engine."""

import functools

import conv_reference
import pytest
import torch
from conv_reference import assert_close_to_eager
from torch import nn

from emanet_triton.kernels.conv import cudnn, eager
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.precision import cuda_fp32

# A pretended GPU computes on the CPU.
make = functools.partial(conv_reference.make, device="cpu")

HALF, SINGLE = torch.float16, torch.float32


class FakeCuda:
    """As much of a tensor on a GPU as the precision setting looks at."""

    is_cuda = True
    dtype = SINGLE


@pytest.mark.parametrize(
    ("precision", "wanted"), [("ieee", "ieee"), ("tf32x3", "ieee"), ("tf32", "tf32")]
)
def test_cudnn_multiplies_as_asked_and_its_setting_is_put_back(precision, wanted):
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    with eager.float32_products(FakeCuda(), precision):
        assert setting.fp32_precision == wanted
    assert setting.fp32_precision == before
    assert isinstance(torch.backends.cudnn.allow_tf32, bool)


CUDNN_CALLS = {
    "plain": (False, True, ["cudnn_convolution_relu"]),
    "residual": (True, True, ["cudnn_convolution_add_relu"]),
    "no-relu": (True, False, []),
    "float32-residual": (SINGLE, True, []),
}


@pytest.mark.parametrize(
    ("residual", "relu", "wanted"), CUDNN_CALLS.values(), ids=CUDNN_CALLS.keys()
)
def test_cudnn_is_called_for_what_it_can_fuse(residual, relu, wanted, monkeypatch):
    calls = fake_cudnn(monkeypatch)
    case = make((1, 8, 5, 5), 4, 3, residual=residual, relu=relu, dilation=2)
    found = conv.conv_bias_act(*case.operands, **case.options, backend="cudnn")
    assert calls == wanted
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))


def test_cudnn_never_gets_its_input_as_residual(monkeypatch):
    calls = fake_cudnn(monkeypatch)
    case = make((1, 8, 5, 5), 8, 1)
    found = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, backend="cudnn")
    assert calls == []
    expected = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, backend="torch")
    assert torch.equal(found, expected)


def fake_cudnn(monkeypatch):
    """Replace cuDNN's operators by stand-ins; returns a list of the names that are called."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_relu")
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_add_relu")
        out = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (out + alpha * z).relu()

    monkeypatch.setattr(cudnn, "has_cudnn", lambda x: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def refusing_cudnn(monkeypatch):
    """cuDNN's fused operators raise ``errors[0]``, or compute if there is none."""
    calls, errors = fake_cudnn(monkeypatch), []
    fused = torch.cudnn_convolution_relu

    def relu(*args):
        out = fused(*args)
        if errors:
            raise errors[0]
        return out

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(cudnn, "_REFUSED", set())
    return calls, errors


def test_a_shape_without_an_engine_goes_to_pytorch_and_is_remembered(refusing_cudnn):
    calls, errors = refusing_cudnn
    errors.append(NO_ENGINE)
    case = make((1, 8, 5, 5), 4, 3)
    message = (
        "cuDNN has no fused convolution of torch.float16 [1, 8, 5, 5] with [4, 8, 3, 3] and "
        f"dilation 1, so PyTorch's is used: {NO_ENGINE}"
    )
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            found = conv.conv_bias_act(*case.operands, backend="cudnn")
            assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    assert [str(w.message) for w in warned] == [message]
    assert len(calls) == 1
    errors.clear()
    conv.conv_bias_act(*make((1, 8, 5, 6), 4, 3).operands, backend="cudnn")
    assert len(calls) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ILLEGAL])
def test_other_errors_of_cudnn_are_not_taken_for_a_missing_engine(refusing_cudnn, error):
    refusing_cudnn[1].append(error)
    with pytest.raises(type(error), match=str(error)):
        conv.conv_bias_act(*make((1, 8, 5, 5), 4, 3).operands, backend="cudnn")
    assert not cudnn._REFUSED


@pytest.mark.parametrize(
    ("short", "wanted"), [(True, torch.OutOfMemoryError), (False, RuntimeError)], ids=str
)
def test_no_engine_for_lack_of_memory(refusing_cudnn, monkeypatch, short, wanted):
    """PyTorch's convolution finds no engine either, and its allocator knows why."""

    def refuse(*args):
        raise NO_ENGINE

    case = make((1, 8, 5, 5), 4, 3)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    monkeypatch.setattr(eager.F, "conv2d", refuse)
    monkeypatch.setattr(cudnn.MemoryWatch, "_is_short", lambda watch: short)
    with pytest.raises(RuntimeError, match="unable to find an engine") as caught:
        conv.conv_bias_act(*case.operands, backend="cudnn")
    assert type(caught.value) is wanted
    assert not cudnn._REFUSED


class Settings:
    """The settings by which PyTorch looks up cuDNN's engines, at each convolution."""

    def __init__(self, monkeypatch):
        self.fused, self.plain = [], []
        fake_cudnn(monkeypatch)
        for module, name, noted in (
            (torch, "cudnn_convolution_relu", self.fused),
            (cudnn, "torch_conv", self.plain),
        ):
            monkeypatch.setattr(module, name, self.noting(getattr(module, name), noted))

    def noting(self, function, noted):
        def run(*args):
            settings = torch.backends.cudnn
            precision = settings.conv.fp32_precision
            noted.append((settings.benchmark, settings.deterministic, precision))
            return function(*args)

        return run


@pytest.mark.parametrize("ambient", ["ieee", "tf32"])
@pytest.mark.parametrize("recording", [False, True], ids=["eager", "recording"])
def test_cudnn_measures_its_fused_engines_only_where_asked(monkeypatch, recording, ambient):
    """PyTorch looks fused engines up by the TF32 setting, but not by ``deterministic``."""
    settings = Settings(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    case = make((1, 8, 5, 5), 4, 3)
    with cuda_fp32(ambient):
        for backend in ("cudnn", "cudnn-benchmark", "cudnn"):
            found = conv.conv_bias_act(*case.operands, backend=backend)
            assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    usual = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, ambient
    other = {"ieee": "tf32", "tf32": "ieee"}[ambient]
    assert settings.fused == [usual, (not recording, True, other), usual]
    assert settings.plain == []


def test_in_float32_cudnn_measures_plain_engines(monkeypatch):
    settings = Settings(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case = make((1, 8, 5, 5), 4, 3, dtype=SINGLE)
    found = conv.conv_bias_act(*case.operands, backend="cudnn-benchmark")
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(SINGLE))
    assert settings.fused == []
    [(benchmark, deterministic, _)] = settings.plain
    assert benchmark
    assert deterministic
