"""The protocols of other projects, each against its own sequence of operations at full size."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tiny_models import random_image
from torch import nn
from torch.nn import functional as F

from emanet_triton.errors import InputError
from emanet_triton.inference import reference
from emanet_triton.inference.inputs import scaled_inputs
from emanet_triton.inference.options import scaled, with_version
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.views import view_sizes
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
RATIOS = (0.5, 0.75, 1.0, 1.25)
SSSEGMENTATION = Protocol(
    (96, 40),
    ratios=RATIOS,
    version="sssegmentation",
    direct=True,
    average="logits",
    scaling="input",
)
OFFICIAL = Protocol(None, align_corners=True, ratios=RATIOS, version="official", pad_step=8)
PADDLESEG = Protocol(
    None,
    align_corners=True,
    ratios=(0.75, 1.0, 1.25),
    version="paddleseg",
    average="logits",
    scaling="rounded",
    final_align_corners=False,
)
PADDLESEG_VOC = replace(PADDLESEG, pad_size=(48, 72))
CHAIN = {"average": "probabilities", "scaling": "previous"}  # PaddleSeg before 2.8
SIZES = [(37, 53), (40, 72), (61, 34), (1, 9)]


class Stub(Network):
    """One convolution with the stride of a network, and clear logits."""

    mean, std = (127.5,) * 3, (127.5,) * 3

    def __init__(self, stride: int, classes: int = 5, scale: float = 4) -> None:
        super().__init__(None, Protocol(None), classes)
        torch.manual_seed(stride)
        self.stride, self.scale = stride, scale
        self.conv = nn.Conv2d(3, classes, 3, stride, 1)
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.scale * self.conv(images)


def bilinear(x, size, align_corners):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def normalised(image, size):
    """The image resized by OpenCV, (x / 255 - 0.5) / 0.5, [1, 3, h, w]."""
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy((resized.astype(np.float32) - 127.5) / 127.5).permute(2, 0, 1)[None]


def fitted(size, width, height):
    factor = min(width / max(size), height / min(size))
    return tuple(int(side * factor + 0.5) for side in size)


def mirrors(ms_flip):
    return (False, True) if ms_flip else (False,)


def run(network, x, mirrored):
    """The network on a mirrored input, its logits mirrored back."""
    return network(x.flip(3)).flip(3) if mirrored else network(x)


def sssegmentation(network, image, ms_flip, base=(96, 40)):
    x = normalised(image, fitted(image.shape[:2], *base))
    views = []
    for ratio in RATIOS if ms_flip else (1,):
        scaled = F.interpolate(x, scale_factor=ratio, mode="bilinear", align_corners=False)
        for mirrored in mirrors(ms_flip):
            views.append(bilinear(run(network, scaled, mirrored), image.shape[:2], False))
    return (sum(views) / len(views)).softmax(1)


def official(network, image, ms_flip):
    views = []
    for ratio in RATIOS if ms_flip else (1,):
        target = [max(int(side * ratio), 1) for side in image.shape[:2]]
        height, width = (max(side, 1) for side in fitted(image.shape[:2], max(target), min(target)))
        x = normalised(image, (height, width))
        down, across = ((8 - (side - 1) % 8) % 8 for side in (height, width))
        x = F.pad(x, (0, across, 0, down))
        assert x.shape[2] % 8 == x.shape[3] % 8 == 1
        for mirrored in mirrors(ms_flip):
            logits = network(x.flip(3) if mirrored else x)
            logits = bilinear(logits, x.shape[2:], True)
            logits = logits.flip(3) if mirrored else logits
            logits = bilinear(logits[:, :, :height, :width], image.shape[:2], True)
            views.append(logits.softmax(1))
    return sum(views) / len(views)


def paddleseg(network, image, ms_flip, pad=(1, 1), base=None, chain=False):
    height, width = fitted(image.shape[:2], *base) if base else image.shape[:2]
    x = normalised(image, (height, width))
    x = single = F.pad(x, (0, max(pad[1] - width, 0), 0, max(pad[0] - height, 0)))
    whole, views = x.shape[2:], []
    for ratio in (0.75, 1.0, 1.25) if ms_flip else (1,):
        x = bilinear(x if chain else single, [int(side * ratio + 0.5) for side in whole], False)
        for mirrored in mirrors(ms_flip):
            logits = bilinear(network(x.flip(3) if mirrored else x), x.shape[2:], True)
            logits = logits.flip(3) if mirrored else logits
            logits = bilinear(logits, whole, False)
            views.append(logits.softmax(1) if chain else logits)
    mean = sum(views) / len(views)
    mean = bilinear(mean[:, :, :height, :width], image.shape[:2], False)
    return mean if chain else mean.softmax(1)


VOC = {"pad": (48, 72)}
PROJECTS = {
    "sssegmentation": (SSSEGMENTATION, sssegmentation),
    "official": (OFFICIAL, official),
    "paddleseg": (PADDLESEG, paddleseg),
    "paddleseg-voc": (PADDLESEG_VOC, partial(paddleseg, **VOC)),
    "paddleseg-fitted": (scaled(PADDLESEG_VOC, (80, 30)), partial(paddleseg, **VOC, base=(80, 30))),
    "paddleseg-2.7": (replace(PADDLESEG_VOC, **CHAIN), partial(paddleseg, **VOC, chain=True)),
}


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", PROJECTS)
def test_the_sequence_of_the_project(name, stride, ms_flip):
    protocol, project = PROJECTS[name]
    network = Stub(stride)
    for size in SIZES:
        image = random_image(*size)
        want = project(network, image, ms_flip)
        got = reference.probabilities(network, [image], protocol, ms_flip)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        predictor = Predictor(network, protocol, ms_flip=ms_flip)
        labels, found = predictor.results([image], probabilities=True)
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
        best = want.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 1e-4
        assert clear.double().mean() > 0.95
        (alone,) = predictor.results([image])
        for each in (labels, alone):
            assert torch.equal(each[clear], want.argmax(1)[clear].byte())


def assert_golden(golden, image, name, predictor):
    """The labels of PaddleSeg, and its scores in every 32nd row."""
    labels, found = predictor.results([golden[f"{image}_image"]], probabilities=True)
    best = found.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 1e-4)[0].numpy()
    assert clear.mean() > 0.95
    want = golden[f"{image}_label_{name}"]
    np.testing.assert_array_equal(labels[0].numpy()[clear], want[clear])
    for kind in ("logit", "probability"):
        if (rows := golden.get(f"{image}_{kind}_rows_{name}")) is not None:
            rows = torch.from_numpy(rows)
            rows = rows.softmax(0) if kind == "logit" else rows
            torch.testing.assert_close(found[0, :, ::32], rows, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("dataset", "images", "changes"),
    [
        ("cityscapes", 2, {"align_corners": False}),
        ("voc", 3, {"pad_size": (64, 64)}),
    ],
)
def test_the_results_of_paddleseg(dataset, images, changes):
    golden = dict(np.load(GOLDEN / f"paddleseg_{dataset}.npz"))
    network = Stub(8, len(golden["weight"]), scale=1)
    for name in ("weight", "bias"):
        setattr(network.conv, name, nn.Parameter(torch.from_numpy(golden[name])))
    network.requires_grad_(False)
    protocol = replace(PADDLESEG, **changes)
    for image in range(images):
        assert_golden(golden, image, "single", Predictor(network, protocol))
        one = Predictor(network, replace(protocol, ratios=(1.0,)), ms_flip=True)
        assert_golden(golden, image, "flip", one)
        assert_golden(golden, image, "ms_flip", Predictor(network, protocol, ms_flip=True))
        chain = Predictor(network, replace(protocol, **CHAIN), ms_flip=True)
        assert_golden(golden, image, "ms_flip_v2.7", chain)


@pytest.mark.parametrize("name", PROJECTS)
def test_the_images_of_a_batch(name):
    protocol, _ = PROJECTS[name]
    network, images = Stub(8), [random_image(37, 53, seed) for seed in range(3)]
    one_by_one = Predictor(network, protocol, ms_flip=True)
    together = Predictor(network, protocol, ms_flip=True, batch_size=3)
    _, got = together.results(images, probabilities=True)
    for image, found in zip(images, got, strict=True):
        _, (want,) = one_by_one.results([image], probabilities=True)
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(37, 53), (41, 23), (64, 48)])
def test_inputs_are_scaled_by_the_factor(size, align_corners):
    ratios = (0.5, 0.75, 1.0, 1.1, 1.3, 1.75)
    protocol = Protocol(None, align_corners=align_corners, ratios=ratios, scaling="input")
    image = random_image(*size)
    (single,) = scaled_inputs([image], protocol, False, CPU)
    each = scaled_inputs([image], protocol, True, CPU)
    sizes = view_sizes(protocol, size, ms_flip=True)
    for ratio, got, named in zip(ratios, each, sizes, strict=True):
        want = F.interpolate(
            single, scale_factor=ratio, mode="bilinear", align_corners=align_corners
        )
        assert torch.equal(got, want)
        assert tuple(got.shape[2:]) == named


def test_windows_of_a_padded_and_scaled_input_cover_it():
    windowed = replace(PADDLESEG_VOC, mode="slide", crop=(33, 41), stride=(20, 30))
    network, image = Stub(8), random_image(37, 53)
    want = reference.probabilities(network, [image], windowed, ms_flip=True)
    _, got = Predictor(network, windowed, ms_flip=True).results([image], probabilities=True)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_the_scale_is_replaced_and_the_rest_kept():
    native = scaled(SSSEGMENTATION, "native")
    assert native == replace(SSSEGMENTATION, base_scale=None)
    image = random_image(33, 90)
    want = sssegmentation(Stub(8), image, True, base=(90, 33))
    got = reference.probabilities(Stub(8), [image], native, ms_flip=True)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_the_version_is_for_protocols_of_mmsegmentation():
    own = Protocol(None, version="mmseg-1.x")
    assert with_version(own, None) is own
    assert with_version(own, "mmseg-0.x") == Protocol(None)
    assert with_version(PADDLESEG, None) is PADDLESEG
    with pytest.raises(InputError, match=r"^--protocol mmseg-1.x: the model's protocol is paddles"):
        with_version(PADDLESEG, "mmseg-1.x")
