"""The parts that are exported compute what the evaluation computes."""

from dataclasses import replace

import pytest
import torch
from exports import OTHERS, PROTOCOLS, SLIDE, pictures, tiny, wrong_labels

from emanet_triton.deploy.parts import ImageToLabels, Labels, Logits
from emanet_triton.deploy.windows import slide
from emanet_triton.inference import reference
from emanet_triton.inference.inputs import normalise
from emanet_triton.models.protocol import Protocol

SIZES = [(1, (64, 128)), (2, (37, 51)), (1, (150, 40)), (1, (40, 260)), (2, (97, 97))]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_the_standard_form_has_the_models_logits():
    model = tiny()
    images = torch.randn(2, 3, 41, 58)
    standard = Logits(model.standard_form(torch.float32))
    torch.testing.assert_close(standard(images), model(images), rtol=1e-4, atol=1e-5)


def test_the_standard_form_of_half_precision_has_logits_in_float32():
    model = tiny()
    images = torch.randn(1, 3, 64, 64)
    logits = Logits(model.standard_form(torch.bfloat16))(images)
    assert logits.dtype == torch.float32
    assert 0 < (logits - model(images)).abs().max() < 0.1 * model(images).abs().max()


@pytest.mark.parametrize(("batch", "size"), SIZES)
@pytest.mark.parametrize("name", PROTOCOLS | OTHERS)
def test_image_to_labels(name, batch, size):
    protocol = (PROTOCOLS | OTHERS)[name]
    model, images = tiny(protocol), pictures(batch, size)
    part = ImageToLabels(model.standard_form(torch.float32), protocol, single=False)
    labels = part(images)
    assert labels.dtype == torch.uint8 and labels.shape == images.shape[:3]
    assert wrong_labels(model, protocol, images, labels) == 0
    assert len(labels.unique()) > 1


def test_an_image_may_keep_its_size():
    protocol = Protocol(None)
    model, images = tiny(protocol), pictures(1, (45, 70))
    part = ImageToLabels(model.standard_form(torch.float32), protocol, single=True)
    labels = part(images[0])
    assert labels.shape == (45, 70)
    assert wrong_labels(model, protocol, images, labels[None]) == 0


@pytest.mark.parametrize("name", PROTOCOLS | OTHERS)
def test_labels_of_normalised_images(name):
    protocol = (PROTOCOLS | OTHERS)[name]
    model, images = tiny(protocol), pictures(2, (65, 129))
    labels = Labels(model.standard_form(torch.float32), protocol)(normalise(images, model))
    native = replace(protocol, base_scale=None)
    assert wrong_labels(model, native, images, labels) == 0


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(65, 129), (30, 100), (49, 49), (20, 30), (50, 140)])
def test_sliding_windows_are_those_of_mmsegmentation(size, align_corners):
    protocol = Protocol(None, "slide", SLIDE.crop, SLIDE.stride, align_corners)
    model, images = tiny(protocol), torch.randn(2, 3, *size)
    expected = reference.view_logits(model, images, size, protocol)
    torch.testing.assert_close(slide(model, images, protocol), expected, rtol=1e-4, atol=1e-5)
