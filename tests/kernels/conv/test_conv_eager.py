"""Which providers take part in a convolution, and what cuDNN's does where it has no engine."""

import functools

import conv_reference
import pytest
import torch
from conv_reference import assert_close_to_eager, on_gpu
from torch import nn

from emanet_triton.kernels.conv import choice as conv_choice
from emanet_triton.kernels.conv import eager as conv_providers
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.precision import cuda_fp32

# A pretended GPU computes on the CPU.
make = functools.partial(conv_reference.make, device="cpu")

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16
X = torch.zeros(2, 8, 6, 5)
W = torch.zeros(4, 8, 3, 3)
B = torch.zeros(4)


def test_the_default_on_a_cpu_is_torch(monkeypatch):
    case = make((1, 8, 5, 5), 4, 3)
    called = []

    def record(*args):
        called.append(args)
        return conv_providers.torch_conv(*args)

    monkeypatch.setitem(conv_providers.CONVOLUTIONS, "torch", record)
    conv.conv_bias_act(*case.operands)
    assert len(called) == 1


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
    with conv_providers._cudnn_precision(FakeCuda(), precision):
        assert setting.fp32_precision == wanted
    assert setting.fp32_precision == before
    assert isinstance(torch.backends.cudnn.allow_tf32, bool)


@pytest.fixture
def nvidia(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")


def names(dtype, precision="ieee", residual=None, relu=True):
    return list(conv._candidates(on_gpu(X.to(dtype)), residual, relu, precision))


def test_what_is_measured_on_nvidia_gpus(nvidia, monkeypatch):
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    assert names(HALF, relu=False) == ["torch", "cudnn-benchmark", "triton"]
    assert names(BF16, residual=X) == ["torch", "cudnn-benchmark", "triton"]
    assert names(SINGLE) == ["cudnn", "torch", "cudnn-benchmark", "triton-tf32x3"]
    assert names(SINGLE, "tf32") == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    monkeypatch.setattr(conv, "HAS_TRITON", False)
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark"]


def test_what_is_measured_on_amd_gpus(amd, monkeypatch):
    assert names(HALF) == ["torch", "triton"]
    assert names(SINGLE) == ["torch"]
    monkeypatch.setattr(conv, "HAS_TRITON", False)
    assert names(HALF) == ["torch"]


def test_without_a_gpu_there_is_nothing_to_measure():
    assert list(conv._candidates(X, None, True, "ieee")) == ["torch"]


@pytest.mark.parametrize(
    ("dtype", "precision", "winner", "wanted"),
    [
        (SINGLE, "ieee", "triton-tf32x3", ("triton", "tf32x3")),
        (SINGLE, "ieee", "cudnn-benchmark", ("cudnn-benchmark", "ieee")),
        (SINGLE, "tf32", "triton", ("triton", "tf32")),
        (HALF, "ieee", "triton", ("triton", "ieee")),
    ],
)
def test_the_winner_computes(nvidia, monkeypatch, dtype, precision, winner, wanted):
    called = []
    for name in conv_providers.CONVOLUTIONS:

        def compute(*args, name=name):
            called.append((name, args[-1]))
            return X

        monkeypatch.setitem(conv_providers.CONVOLUTIONS, name, compute)
    monkeypatch.setattr(conv_choice, "choose", lambda *_: winner)
    operands = on_gpu(X.to(dtype)), W.to(dtype), B.to(dtype)
    conv._run_conv_bias_act(*operands, None, 1, 1, True, dtype, "auto", precision)
    assert called == [wanted]


@pytest.fixture
def keys(monkeypatch):
    """What convolutions on a GPU are looked up by; plain PyTorch computes them."""
    found = []

    def choose(key, device, calls, last_resort, make_check):
        found.append(key)
        return last_resort

    monkeypatch.setattr(conv, "has_cudnn", lambda x: True)
    monkeypatch.setattr(conv_choice, "choose", choose)
    return found


def test_the_choice_is_made_by_all_that_decides_the_time(keys):
    residual = torch.zeros(2, 4, 6, 5)
    conv.conv_bias_act(X, W, B)
    conv.conv_bias_act(X[:1], W, B)
    conv.conv_bias_act(X.half(), W.half(), B)
    conv.conv_bias_act(X.half(), W.half(), B, out_dtype=SINGLE)
    conv.conv_bias_act(X, W, B, residual)
    conv.conv_bias_act(X, W, B, stride=2)
    conv.conv_bias_act(X, W, B, dilation=2)
    conv.conv_bias_act(X, W, B, relu=False)
    conv.conv_bias_act(X, W, B, precision="tf32")
    assert len(set(keys)) == 9
    conv.conv_bias_act(X + 1, W, B)
    assert keys[-1] == keys[0]


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
    found = conv.conv_bias_act(*case.operands, **case.options, provider="cudnn")
    assert calls == wanted
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))


def test_cudnn_never_gets_its_input_as_residual(monkeypatch):
    calls = fake_cudnn(monkeypatch)
    case = make((1, 8, 5, 5), 8, 1)
    found = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, provider="cudnn")
    assert calls == []
    expected = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, provider="torch")
    assert torch.equal(found, expected)


def fake_cudnn(monkeypatch):
    """Stand-ins with the signatures of cuDNN's operators; the names of those that were called."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_relu")
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_add_relu")
        out = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (out + alpha * z).relu()

    monkeypatch.setattr(conv_providers, "has_cudnn", lambda x: True)
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
    monkeypatch.setattr(conv_providers, "_REFUSED", set())
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
            found = conv.conv_bias_act(*case.operands, provider="cudnn")
            assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    assert [str(w.message) for w in warned] == [message]
    assert len(calls) == 1
    errors.clear()
    conv.conv_bias_act(*make((1, 8, 5, 6), 4, 3).operands, provider="cudnn")
    assert len(calls) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ILLEGAL])
def test_other_errors_of_cudnn_are_not_taken_for_a_missing_engine(refusing_cudnn, error):
    refusing_cudnn[1].append(error)
    with pytest.raises(type(error), match=str(error)):
        conv.conv_bias_act(*make((1, 8, 5, 5), 4, 3).operands, provider="cudnn")
    assert not conv_providers._REFUSED


@pytest.mark.parametrize(
    ("short", "wanted"), [(True, torch.OutOfMemoryError), (False, RuntimeError)], ids=str
)
def test_no_engine_for_lack_of_memory(refusing_cudnn, monkeypatch, short, wanted):
    """PyTorch's convolution finds none, either, and its allocator knows why."""

    def refuse(*args):
        raise NO_ENGINE

    case = make((1, 8, 5, 5), 4, 3)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    monkeypatch.setattr(conv_providers.F, "conv2d", refuse)
    monkeypatch.setattr(conv_providers.MemoryWatch, "_is_short", lambda watch: short)
    with pytest.raises(RuntimeError, match="unable to find an engine") as caught:
        conv.conv_bias_act(*case.operands, provider="cudnn")
    assert type(caught.value) is wanted
    assert not conv_providers._REFUSED


class Settings:
    """What cuDNN's engines are looked up by, at each of its fused or plain convolutions."""

    def __init__(self, monkeypatch):
        self.fused, self.plain = [], []
        fake_cudnn(monkeypatch)
        for module, name, noted in (
            (torch, "cudnn_convolution_relu", self.fused),
            (conv_providers, "torch_conv", self.plain),
        ):
            monkeypatch.setattr(module, name, self.noting(getattr(module, name), noted))

    def noting(self, function, noted):
        def run(*args):
            cudnn = torch.backends.cudnn
            noted.append((cudnn.benchmark, cudnn.deterministic, cudnn.conv.fp32_precision))
            return function(*args)

        return run


@pytest.mark.parametrize("ambient", ["ieee", "tf32"])
@pytest.mark.parametrize("recording", [False, True], ids=["eager", "recording"])
def test_cudnn_measures_its_fused_engines_only_where_asked(monkeypatch, recording, ambient):
    """PyTorch looks them up by the TF32 setting, but not by whether they shall be deterministic."""
    settings = Settings(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    case = make((1, 8, 5, 5), 4, 3)
    with cuda_fp32(ambient):
        for provider in ("cudnn", "cudnn-benchmark", "cudnn"):
            found = conv.conv_bias_act(*case.operands, provider=provider)
            assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    usual = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, ambient
    other = {"ieee": "tf32", "tf32": "ieee"}[ambient]
    assert settings.fused == [usual, (not recording, True, other), usual]
    assert settings.plain == []


def test_in_float32_cudnn_measures_plain_engines(monkeypatch):
    settings = Settings(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    case = make((1, 8, 5, 5), 4, 3, dtype=SINGLE)
    found = conv.conv_bias_act(*case.operands, provider="cudnn-benchmark")
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(SINGLE))
    assert settings.fused == []
    [(benchmark, deterministic, _)] = settings.plain
    assert benchmark
    assert deterministic
