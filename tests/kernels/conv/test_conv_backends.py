"""Which backends are candidates for a convolution, and by which key the choice is kept."""

import pytest
import torch
from conv_reference import make, on_gpu

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.conv.eager import torch_conv

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16
X = torch.zeros(2, 8, 6, 5)
W = torch.zeros(4, 8, 3, 3)
B = torch.zeros(4)


def test_the_default_on_a_cpu_is_torch(monkeypatch):
    case = make((1, 8, 5, 5), 4, 3, device="cpu")
    called = []

    def record(*args):
        called.append(args)
        return torch_conv(*args)

    monkeypatch.setitem(conv.CONVOLUTIONS, "torch", record)
    conv.conv_bias_act(*case.operands)
    assert len(called) == 1


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
    for name in conv.CONVOLUTIONS:

        def compute(*args, name=name):
            called.append((name, args[-1]))
            return X

        monkeypatch.setitem(conv.CONVOLUTIONS, name, compute)
    monkeypatch.setattr(choice, "choose", lambda *_: winner)
    operands = on_gpu(X.to(dtype)), W.to(dtype), B.to(dtype)
    conv._run_conv_bias_act(*operands, None, 1, 1, True, dtype, "auto", precision)
    assert called == [wanted]


@pytest.fixture
def keys(monkeypatch):
    """Keys of the choices for convolutions on a GPU; plain PyTorch computes them."""
    found = []

    def choose(key, device, calls, last_resort, make_checks):
        found.append(key)
        return last_resort

    monkeypatch.setattr(conv, "has_cudnn", lambda x: True)
    monkeypatch.setattr(choice, "choose", choose)
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
