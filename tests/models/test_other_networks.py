"""The networks of other projects against what these projects computed with the same weights."""

import pytest
import torch
from golden_data import relative_error
from other_golden import ARCHITECTURES, other_model, other_vectors

from emanet_triton import fuse
from emanet_triton.kernels.conv import winograd

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_golden_logits(name, monkeypatch):
    monkeypatch.setattr(winograd, "FEW_PIXELS", {4: 0, 2: 0})  # as in large images
    images, want = other_vectors(name)
    model = other_model(name)
    stride = 16 if name == "sssegmentation_r50os16" else 8
    assert model.stride == stride
    assert want.shape[2:] == (-(-65 // stride), -(-97 // stride))
    with torch.no_grad():
        for network in (model, fuse(model), model.standard_form(torch.float32)):
            assert relative_error(network(images), want) <= TOLERANCE
