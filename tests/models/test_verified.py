"""Where the fused network is relied on, and how long it is kept."""

import gc
import weakref

import pytest
import torch

from emanet_triton.models import verified
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.fused import FusedEMANet, fuse
from emanet_triton.models.protocol import Protocol


def make_model():
    torch.manual_seed(0)
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    return EMANet(architecture, Protocol((64, 32))).eval()


@pytest.fixture
def model():
    return make_model()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_agreement(model, dtype):
    assert verified.disagreement(fuse(model, dtype=dtype), model, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("wrong", [1.1, float("nan")], ids=["a-tenth", "nan"])
def test_disagreement(model, dtype, wrong):
    fused = fuse(model, dtype=dtype)
    fused.decode_head.conv_seg.weight *= wrong
    assert "relative error" in verified.disagreement(fused, model, dtype)


class OnGpu(EMANet):
    """A model that says that it is on a GPU."""

    def parameters(self, recurse=True):
        first, *rest = super().parameters(recurse)
        yield torch.nn.Parameter(torch.empty_like(first, device="meta"))
        yield from rest


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (lambda *_: "relative error 0.5", r"does not work on meta \(relative error 0.5\)"),
        (lambda *_: 1 / 0, r"\(ZeroDivisionError: division by zero\)"),
    ],
    ids=["wrong", "fails"],
)
def test_on_a_gpu_the_plain_network_runs_where_they_disagree(model, monkeypatch, found, message):
    model.__class__ = OnGpu
    monkeypatch.setattr(verified, "disagreement", found)
    with pytest.warns(UserWarning, match=message):
        assert verified.verified_fuse(model) is model


def test_on_a_gpu_the_fused_network_runs_where_they_agree(model, monkeypatch):
    model.__class__ = OnGpu
    monkeypatch.setattr(verified, "disagreement", lambda *_: None)
    assert isinstance(verified.verified_fuse(model), FusedEMANet)


def test_it_is_kept_until_a_weight_changes(model):
    first = verified.kept_fuse(model)
    assert isinstance(first, FusedEMANet)
    assert verified.kept_fuse(model) is first
    with torch.no_grad():
        model.decode_head.conv_seg.weight.mul_(2)
    second = verified.kept_fuse(model)
    assert second is not first
    model.decode_head.ema_module.bases = model.decode_head.ema_module.bases.clone()
    third = verified.kept_fuse(model)
    assert third is not second
    assert verified.kept_fuse(model, torch.bfloat16).dtype == torch.bfloat16


def test_it_does_not_outlive_the_model():
    model = make_model()
    kept = weakref.ref(verified.kept_fuse(model))
    del model
    gc.collect()
    assert kept() is None


def test_a_model_of_inference_tensors_runs_as_it_is(model):
    with torch.inference_mode():
        model.decode_head.ema_module.bases = torch.zeros_like(model.decode_head.ema_module.bases)
    assert verified.kept_fuse(model) is model
