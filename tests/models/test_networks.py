"""All four networks against what mmsegmentation computed with the same weights."""

import golden_data
import numpy as np
import pytest
import torch

from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol


@pytest.mark.parametrize("name", golden_data.NAMES)
def test_state_dict_is_the_published_one_in_order(name):
    got = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in golden_data.golden_model(name).state_dict().items()
    ]
    assert got == golden_data.listed_keys(name)


@pytest.mark.parametrize("name", golden_data.NAMES)
def test_stages_and_logits(name):
    model = golden_data.golden_model(name)
    golden = golden_data.vectors(name)
    with torch.no_grad():
        images = golden_data.normalised(golden["image"])
        for i, stage in enumerate(model.backbone(images)):
            mean, std = stage.mean((0, 2, 3)), stage.std((0, 2, 3))
            np.testing.assert_allclose(mean, golden[f"stage{i}_mean"].ravel(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(std, golden[f"stage{i}_std"].ravel(), rtol=1e-4, atol=1e-5)
        logits = model(images)
    assert golden_data.relative_error(logits, torch.from_numpy(golden["logits"])) <= 1e-4


def test_training_mode_returns_both_heads_and_reaches_every_trained_weight():
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    model = EMANet(architecture, Protocol((64, 32)), num_classes=5)
    logits, auxiliary = model(torch.randn(2, 3, 40, 56))
    assert logits.shape == auxiliary.shape == (2, 5, 5, 7)
    (logits.mean() + auxiliary.mean()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    # The EM steps pass no gradient, so the projection before them is frozen.
    assert without == {
        "decode_head.ema_mid_conv.conv.weight",
        "decode_head.ema_mid_conv.conv.bias",
    }
