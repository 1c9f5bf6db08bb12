"""``quantize`` takes networks with the features of other projects."""

import pytest
import torch
from small_networks import VARIANTS, logits, small_model
from test_quantize import error, inputs, needs_int8, picture

from emanet_triton import quantize
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.quantized import QuantizedConv

NOISE = 0.06  # of the largest logit; the largest of these networks has 0.050, in bfloat16 0.013


@needs_int8
@pytest.mark.parametrize("name", VARIANTS)
def test_labels_are_those_of_float32_where_they_are_clear(name):
    model = small_model(VARIANTS[name])
    model.protocol = Protocol(None)
    pictures = [picture(seed, 128, 96) for seed in range(4)]
    images = inputs(model, *pictures)
    quantized = quantize(model, pictures)
    assert any(isinstance(layer, QuantizedConv) for layer in quantized.modules())
    found, wanted = logits(quantized, images), logits(model, images)
    assert found.shape == wanted.shape
    assert error(found, wanted) <= NOISE
    first, second = wanted.topk(2, dim=1).values.unbind(1)
    clear = first - second > 2 * NOISE * wanted.abs().max()
    assert clear.sum() >= 10
    assert torch.equal(found.argmax(1)[clear], wanted.argmax(1)[clear])
