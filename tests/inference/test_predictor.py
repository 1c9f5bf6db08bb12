"""Whole, sliding and multi-scale inference against mmsegmentation's own results."""

import golden_data
import numpy as np
import pytest
import torch
from tiny_models import random_image, tiny_model

from emanet_triton import fuse, segment
from emanet_triton.eval.metric import confusion_matrix
from emanet_triton.inference import reference
from emanet_triton.inference.inputs import resize_image
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.protocol import Protocol

R50_WHOLE = "emanet_r50-d8_512x1024_80k_cityscapes"
R101_WHOLE = "emanet_r101-d8_512x1024_80k_cityscapes"
R50_SLIDING = "emanet_r50-d8_769x769_80k_cityscapes"
# The views do not depend on the depth: many views of each mode and of each depth once.
CASES = {
    **{f"{name}-single": (name, False) for name in golden_data.NAMES},
    **{f"{name}-ms_flip": (name, True) for name in (R101_WHOLE, R50_SLIDING)},
}


def assert_same_labels(got, want, probabilities, margin=1e-3):
    """Equal labels wherever the two best probabilities differ by more than ``margin``."""
    best = np.sort(probabilities, axis=0)[-2:]
    clear = best[1] - best[0] > margin
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], want[clear])


class Recorded(torch.nn.Module):
    """A network's outputs, kept in their order and played back."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.outputs, self.position = model, [], 0

    def record(self, inputs):
        self.outputs.append(self.model(inputs))
        return self.outputs[-1]

    def forward(self, _):
        self.position += 1
        return self.outputs[self.position - 1]


@pytest.mark.parametrize(("name", "ms_flip"), CASES.values(), ids=CASES)
def test_golden_protocol(name, ms_flip):
    golden, model = golden_data.vectors(name), golden_data.golden_model(name)
    image, suffix = golden["image"], "_ms_flip" if ms_flip else ""
    want, want_labels = golden[f"prob{suffix}_rows"], golden[f"label{suffix}"]
    asked = model.protocol, ms_flip
    network = Recorded(model)
    with torch.inference_mode():
        plain = reference.probabilities(network.record, [image], *asked)[0].numpy()
        given = iter(network.outputs)
        exact = reference.probabilities(lambda _: next(given).double(), [image], *asked)[0].numpy()
    np.testing.assert_allclose(plain[:, ::16], want, rtol=0, atol=1e-4)
    assert_same_labels(plain.argmax(0), want_labels, plain)

    # The same logits through the composed taps, and the fused network.
    batches = Predictor(network, model.protocol, ms_flip=ms_flip, batch_size=64)
    taps, probabilities = (r[0].numpy() for r in batches.results([image], probabilities=True))
    error, plain_error = (np.abs(got - exact).max() for got in (probabilities, plain))
    assert error <= 2 * plain_error + 1e-6
    assert_same_labels(taps, exact.argmax(0), exact, margin=1e-5)
    targets = torch.from_numpy(want_labels.copy())
    targets[:7] = 255
    counted, wanted = (
        confusion_matrix(targets, torch.from_numpy(labels.astype(np.uint8)))
        for labels in (taps, plain.argmax(0))
    )
    assert torch.equal(counted, wanted)
    if ms_flip and model.protocol.mode == "slide":
        # One by one, each of the 154 windows would read all weights anew.
        many = Predictor(fuse(model), model.protocol, ms_flip=True, batch_size=64)
        fused = tuple(r[0].numpy() for r in many.results([image], probabilities=True))
    else:
        fused = segment(fuse(model), image, ms_flip=ms_flip, return_probabilities=True)
    for labels, got in ((taps, probabilities), fused):
        assert labels.dtype == np.uint8
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[:, ::16], want, rtol=0, atol=1e-4)
        assert_same_labels(labels, want_labels, got)


@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_odd_size(name):
    golden = golden_data.vectors(name)
    model = golden_data.golden_model(name)
    labels, probabilities = segment(model, golden["image_odd"], return_probabilities=True)
    assert_same_labels(labels, golden["label_odd"], probabilities)


@pytest.mark.parametrize("size", [k for k in golden_data.vectors("imrescale") if k != "image"])
def test_golden_image_resize(size):
    golden = golden_data.vectors("imrescale")
    width, height = map(int, size.split("x"))
    np.testing.assert_array_equal(resize_image(golden["image"], (height, width)), golden[size])


def test_slide_with_one_window_is_whole():
    image = random_image(24, 40)
    model = tiny_model()
    _, whole = segment(model, image, return_probabilities=True)
    slide = Protocol((64, 32), "slide", crop=(90, 90), stride=(60, 60))
    _, windowed = segment(model, image, protocol=slide, return_probabilities=True)
    np.testing.assert_array_equal(whole, windowed)


def test_mirrored_views_make_the_result_symmetric():
    image = random_image(32, 64)
    model = tiny_model(ratios=(1.0,))
    _, plain = segment(model, image, ms_flip=True, return_probabilities=True)
    _, mirrored = segment(model, image[:, ::-1].copy(), ms_flip=True, return_probabilities=True)
    np.testing.assert_allclose(plain, mirrored[:, :, ::-1], rtol=0, atol=1e-6)


def test_versions_differ_only_in_ms_flip():
    image = random_image(40, 80)
    model = tiny_model(base_scale=(97, 49))
    first = Protocol((97, 49))
    second = Protocol((97, 49), version="mmseg-1.x")
    np.testing.assert_array_equal(
        segment(model, image, protocol=first), segment(model, image, protocol=second)
    )
    _, a = segment(model, image, protocol=first, ms_flip=True, return_probabilities=True)
    _, b = segment(model, image, protocol=second, ms_flip=True, return_probabilities=True)
    assert np.abs(a - b).max() > 1e-3


def test_the_name_says_how_a_fused_network_chooses_its_kernels():
    model = tiny_model()
    fused = fuse(model)

    def name(network):
        return Predictor(network, model.protocol).network_name

    assert (name(model), name(fused)) == ("plain", "fused")
    fused.choose_by("fastest-known")
    assert name(fused) == "fused (fastest-known)"
    fused.choose_by("auto")
    assert name(fused) == "fused"


def test_batches_of_equal_images_give_each_image_its_labels():
    model = tiny_model()
    images = [random_image(24, 40, i) for i in range(5)] + [random_image(25, 31)]
    got = list(Predictor(model, model.protocol, batch_size=4)(images))
    for labels, image in zip(got, images, strict=True):
        want, probabilities = segment(model, image, return_probabilities=True)
        best = np.sort(probabilities, axis=0)[-2:]
        clear = best[1] - best[0] > 1e-5  # another batch size, another order of summation
        np.testing.assert_array_equal(labels.numpy()[clear], want[clear])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(precision):
    model, image = golden_data.golden_model(R50_WHOLE), golden_data.vectors(R50_WHOLE)["image"]
    labels = next(Predictor(model, model.protocol, precision=precision)([image]))
    agreement = (labels.numpy() == golden_data.vectors(R50_WHOLE)["label"]).mean()
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 3), (2, 3), (7, 3), (65, 3), (1, 8192), (8192, 1), (8192, 8192)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_images_of_any_size(height, width, mode):
    windowed = {"crop": (33, 33), "stride": (22, 22)} if mode == "slide" else {}
    labels = segment(tiny_model(mode=mode, **windowed), random_image(height, width))
    assert labels.shape == (height, width)
    assert labels.max() < 19
