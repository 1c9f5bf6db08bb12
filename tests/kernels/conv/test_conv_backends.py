"""Which backends are candidates for a convolution, and by which key the choice is kept."""

import pytest
import torch
from conv_reference import make, on_gpu

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv import backends
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
    return list(backends.candidates(on_gpu(X.to(dtype)), W, residual, 1, relu, precision))


def test_what_is_measured_on_nvidia_gpus(nvidia, monkeypatch):
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    assert names(HALF, relu=False) == ["torch", "cudnn-benchmark", "triton"]
    assert names(BF16, residual=X) == ["torch", "cudnn-benchmark", "triton"]
    assert names(SINGLE) == ["cudnn", "torch", "cudnn-benchmark", "triton-tf32x3"]
    assert names(SINGLE, "tf32") == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark"]


def test_what_is_measured_on_amd_gpus(amd, monkeypatch):
    assert names(HALF) == ["torch", "triton"]
    assert names(SINGLE) == ["torch"]
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert names(HALF) == ["torch"]


def test_without_a_gpu_there_is_nothing_to_measure():
    assert list(backends.candidates(X, W, None, 1, True, "ieee", gluon=True)) == ["torch"]


@pytest.fixture
def hopper(nvidia, monkeypatch):
    """On a Hopper GPU, as far as choices ask."""
    monkeypatch.setattr(backends, "gluon_arch", lambda x: "sm_90")


WIDE = torch.zeros(2, 64, 6, 5), torch.zeros(8, 64, 3, 3)


def by_gluon(x=WIDE[0], weight=WIDE[1], dtype=HALF, stride=1, gluon=True):
    x = on_gpu(x.to(dtype))
    return "gluon" in backends.candidates(x, weight, None, stride, True, "ieee", gluon)


def test_gluon_is_measured_where_it_can_run_if_asked_for(hopper, monkeypatch):
    assert by_gluon()
    assert by_gluon(dtype=BF16)
    assert not by_gluon(gluon=False)
    assert not by_gluon(dtype=SINGLE)
    assert not by_gluon(stride=2)
    assert not by_gluon(X, W)
    assert not by_gluon(weight=torch.zeros(19, 64, 1, 1))
    monkeypatch.setattr(backends, "gluon_arch", lambda x: "sm_100")
    assert not by_gluon()


@pytest.mark.parametrize(
    ("arch", "x", "weight", "stride", "needs"),
    [
        (
            "sm_90",
            WIDE[0],
            WIDE[1],
            1,
            "float16 or bfloat16 on an NVIDIA Hopper GPU, got torch.float32",
        ),
        ("sm_80", WIDE[0].half(), WIDE[1], 1, "Hopper GPU, got torch.float16 on sm_80"),
        ("sm_90", WIDE[0].half(), WIDE[1], 2, "stride 1, got 2"),
        ("sm_90", X.half(), W, 1, "in multiples of 64, outputs of 8, got 8 and 4"),
    ],
)
def test_where_gluon_cannot_run(monkeypatch, arch, x, weight, stride, needs):
    monkeypatch.setattr(backends, "gluon_arch", lambda x: arch)
    with pytest.raises(ValueError, match=f"backend 'gluon' needs .*{needs}"):
        backends.CONVOLUTIONS["gluon"](on_gpu(x), weight, B, None, stride)


def test_gluon_needs_a_gpu():
    x, weight = (t.half() for t in WIDE)
    with pytest.raises(ValueError, match=r"on an NVIDIA Hopper GPU, got torch\.float16 on cpu"):
        conv.conv_bias_act(x, weight, torch.zeros(8), backend="gluon")


def test_fastest_on_a_cpu_is_torch():
    case = make((1, 8, 5, 5), 4, 3, device="cpu")
    found = conv.conv_bias_act(*case.operands, backend="fastest")
    assert torch.equal(found, conv.conv_bias_act(*case.operands, backend="torch"))


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

    monkeypatch.setattr(backends, "has_cudnn", lambda x: True)
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


def test_with_gluon_the_choice_is_another(keys, monkeypatch):
    monkeypatch.setattr(backends, "why_not_gluon", lambda *_: None)
    known = {}
    monkeypatch.setattr(choice, "known", lambda key, device: known.get((key, device)))

    def key_by(backend):
        conv._run_conv_bias_act(on_gpu(X), W, B, None, 1, 1, True, SINGLE, backend, "ieee")
        return keys[-1]

    assert key_by("auto") != key_by("fastest")
    assert key_by("fastest-known") == key_by("auto")
    known[key_by("fastest"), X.device] = "gone"  # no candidate any more
    assert key_by("fastest-known") == key_by("auto")


@pytest.mark.parametrize("winner", ["gluon", "torch"])
def test_an_earlier_winner_runs_and_nothing_is_measured(keys, monkeypatch, winner):
    monkeypatch.setattr(backends, "why_not_gluon", lambda *_: None)
    monkeypatch.setattr(choice, "known", lambda key, device: winner)
    monkeypatch.setitem(conv.CONVOLUTIONS, winner, lambda *_: winner)
    arguments = on_gpu(X), W, B, None, 1, 1, True, SINGLE, "fastest-known", "ieee"
    assert conv._run_conv_bias_act(*arguments) == winner
    assert keys == []
