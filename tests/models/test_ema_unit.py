"""The EMA unit: the block of the published head, its gradients, memory formats and dtypes."""

import golden_data
import pytest
import torch
from torch import nn

from emanet_triton import EMAHead, EMAUnit


def unit_and_features(**options) -> tuple[EMAUnit, torch.Tensor]:
    torch.manual_seed(0)
    unit = EMAUnit(16, num_bases=4, **options)
    return unit, torch.randn(2, 16, 6, 7)


def test_the_weights_of_a_head_fit_and_give_its_features():
    torch.manual_seed(0)
    head = EMAHead(24, ema_channels=16, num_bases=4, channels=8).eval()
    unit = EMAUnit(16, num_bases=4).eval()
    own = unit.state_dict().keys()
    unit.load_state_dict({key: value for key, value in head.state_dict().items() if key in own})
    seen = {}
    head.ema_in_conv.register_forward_hook(lambda *call: seen.update(features=call[2]))
    head.bottleneck.register_forward_pre_hook(lambda _, inputs: seen.update(out=inputs[0]))
    with torch.no_grad():
        head(torch.randn(1, 24, 5, 6))
        assert torch.equal(unit(seen["features"]), seen["out"])
    assert not torch.equal(seen["features"], seen["out"])


def test_no_gradient_passes_the_attention():
    unit, feats = unit_and_features(relu=False)
    feats.requires_grad_()
    unit(feats).sum().backward()
    assert torch.equal(feats.grad, torch.ones_like(feats))  # the residual's alone
    assert unit.ema_out_conv.conv.weight.grad.abs().sum() > 0
    assert [name for name, weight in unit.named_parameters() if weight.grad is None] == [
        "ema_mid_conv.conv.weight",
        "ema_mid_conv.conv.bias",
    ]


def test_training_moves_the_bases_and_evaluation_does_not():
    unit, feats = unit_and_features()
    before = unit.ema_module.bases.clone()
    unit.eval()(feats)
    assert torch.equal(unit.ema_module.bases, before)
    unit.train()(feats)
    assert not torch.equal(unit.ema_module.bases, before)


def test_the_relu_can_be_left_out():
    unit, feats = unit_and_features()
    bare, _ = unit_and_features(relu=False)
    out = bare.eval()(feats)
    assert out.min() < 0
    assert torch.equal(unit.eval()(feats), out.relu())
    assert "relu=False" in repr(bare)


def test_a_new_unit_changes_nothing_if_its_batch_norm_begins_at_zero():
    unit, feats = unit_and_features()
    nn.init.zeros_(unit.ema_out_conv.bn.weight)
    assert torch.equal(unit(feats.relu()), feats.relu())


def test_channels_last():
    unit, feats = unit_and_features()
    out = unit.eval()(feats.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, unit(feats), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [EMAUnit, EMAHead])
def test_training_under_autocast(kind):
    torch.manual_seed(0)
    options = {"num_classes": 3, "channels": 8, "ema_channels": 16} if kind is EMAHead else {}
    module, feats = kind(16, num_bases=4, **options), torch.randn(2, 16, 6, 7)
    before = next(module.buffers()).clone()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(feats)
    out.float().square().mean().backward()
    assert not torch.equal(next(module.buffers()), before)
    assert next(module.buffers()).dtype == torch.float32
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in trained)
    with torch.no_grad():
        want = module.eval()(feats)
        with torch.autocast("cpu", torch.bfloat16):
            got = module(feats)
    assert golden_data.relative_error(got.float(), want) < 0.02


@pytest.mark.parametrize("shape", [(2, 9, 4, 4), (2, 20, 16)], ids=["channels", "tokens"])
def test_wrong_features(shape):
    with pytest.raises(ValueError, match=r"features must be \[B, 16, H, W\], got \[2, "):
        EMAUnit(16)(torch.zeros(shape))
