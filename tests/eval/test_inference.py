"""Whole, sliding and multi-scale inference against mmsegmentation's own results."""

import golden_data
import numpy as np
import pytest
import torch

from emanet_triton import segment
from emanet_triton.errors import InputError
from emanet_triton.eval import reference
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.inputs import resize_image
from emanet_triton.eval.metric import confusion_matrix
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

R50_WHOLE = "emanet_r50-d8_512x1024_80k_cityscapes"


def tiny_model(**protocol) -> EMANet:
    torch.manual_seed(0)
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    model = EMANet(architecture, Protocol(**({"base_scale": (64, 32)} | protocol))).eval()
    model.decode_head.conv_seg.weight.data *= 300  # so that pixels differ clearly
    return model


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_same_labels(got, want, probabilities, margin=1e-3):
    """Equal labels wherever the two best probabilities differ by more than ``margin``."""
    best = np.sort(probabilities, axis=0)[-2:]
    clear = best[1] - best[0] > margin
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], want[clear])


@torch.inference_mode()
def plain_probabilities(model, image, ms_flip):
    """The plain sequence's probabilities, in float32 and, of the same logits, in float64."""
    given = []

    def recorded(inputs):
        given.append(model(inputs))
        return given[-1]

    plain = reference.probabilities(recorded, [image], model.protocol, ms_flip)
    again = iter(given)
    exact = reference.probabilities(
        lambda _: next(again).double(), [image], model.protocol, ms_flip
    )
    return plain[0].numpy(), exact[0].numpy()


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_protocol(name, ms_flip):
    golden, model = golden_data.vectors(name), golden_data.golden_model(name)
    image, suffix = golden["image"], "_ms_flip" if ms_flip else ""
    labels, probabilities = segment(model, image, ms_flip=ms_flip, return_probabilities=True)
    assert labels.dtype == np.uint8
    assert probabilities.dtype == np.float32
    plain, exact = plain_probabilities(model, image, ms_flip)
    want = golden[f"prob{suffix}_rows"]
    np.testing.assert_allclose(probabilities[:, ::16], want, rtol=0, atol=1e-4)
    np.testing.assert_allclose(plain[:, ::16], want, rtol=0, atol=1e-4)
    error, plain_error = (np.abs(got - exact).max() for got in (probabilities, plain))
    assert error <= 2 * plain_error + 1e-6
    assert_same_labels(labels, golden[f"label{suffix}"], probabilities)
    assert_same_labels(plain.argmax(0), golden[f"label{suffix}"], probabilities)
    assert_same_labels(labels, exact.argmax(0), exact, margin=1e-5)


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_confusion_matrix(name, ms_flip):
    golden, model = golden_data.vectors(name), golden_data.golden_model(name)
    predictor = Predictor(model, model.protocol, ms_flip=ms_flip)
    targets = golden["label"].copy()
    targets[:7] = 255
    with torch.inference_mode():
        plain = reference.probabilities(model, [golden["image"]], model.protocol, ms_flip)[0]
    want = confusion_matrix(torch.from_numpy(targets), plain.argmax(0).to(torch.uint8))
    assert torch.equal(predictor.confusion([golden["image"]], [targets]), want)


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
    np.testing.assert_array_equal(resize_image(golden["image"], (width, height)), golden[size])


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


def test_tensor_in_tensor_out():
    image = random_image(20, 30)
    model = tiny_model()
    labels, probabilities = segment(model, torch.from_numpy(image), return_probabilities=True)
    assert labels.dtype == torch.uint8
    assert probabilities.shape == (19, 20, 30)
    np.testing.assert_array_equal(labels.numpy(), segment(model, image))
    torch.testing.assert_close(probabilities.sum(0), torch.ones(20, 30))
    assert torch.equal(labels, probabilities.argmax(0).to(torch.uint8))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros((4, 4, 3), dtype=torch.int64),
    ],
    ids=["float", "grey", "rgba", "empty", "int64-tensor"],
)
def test_bad_image(image):
    with pytest.raises(ValueError, match=r"image must be uint8 RGB \[H, W, 3\], got "):
        segment(tiny_model(), image)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        segment(tiny_model().train(), random_image(8, 8))


def test_batches_of_equal_images_give_each_image_its_labels():
    model = tiny_model()
    images = [random_image(24, 40, i) for i in range(5)] + [random_image(25, 31)]
    got = list(Predictor(model, model.protocol, batch_size=4)(images))
    for labels, image in zip(got, images, strict=True):
        want, probabilities = segment(model, image, return_probabilities=True)
        best = np.sort(probabilities, axis=0)[-2:]
        clear = best[1] - best[0] > 1e-5  # another batch size, another order of summation
        np.testing.assert_array_equal(labels.numpy()[clear], want[clear])


def test_confusion_of_batches_of_unequal_images():
    model = tiny_model()
    images = [random_image(24, 40, i) for i in range(3)] + [random_image(25, 31)]
    targets = [image[..., 0] % 19 for image in images]
    predictor = Predictor(model, model.protocol, batch_size=2)
    want = sum(
        confusion_matrix(torch.from_numpy(target), labels)
        for target, labels in zip(targets, predictor(images), strict=True)
    )
    got = predictor.confusion(images, targets)
    assert got.dtype == torch.int64
    assert torch.equal(got, want)


class LimitedMemory(torch.nn.Module):
    """A model that runs out of memory above ``limit`` inputs."""

    def __init__(self, limit: int, error: Exception) -> None:
        super().__init__()
        self.model, self.limit, self.error = tiny_model(), limit, error
        self.batches = []

    def forward(self, inputs):
        self.batches.append(len(inputs))
        if len(inputs) > self.limit:
            raise self.error
        return self.model(inputs)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    model = LimitedMemory(2, error)
    images = [random_image(16, 24, i) for i in range(9)]
    predictor = Predictor(model, model.model.protocol, batch_size=8)
    with pytest.warns(UserWarning, match="out of memory on cpu; going on with batch size") as seen:
        got = list(predictor(images))
    assert [str(w.message)[-1] for w in seen] == ["4", "2"]
    assert model.batches == [8, 4, 2, 2, 2, 2, 1]
    for labels, want in zip(got, Predictor(model.model, model.model.protocol)(images), strict=True):
        assert (labels == want).float().mean() > 0.99


def test_out_of_memory_at_batch_one_is_an_input_error():
    model = LimitedMemory(0, OUT_OF_MEMORY[0])
    with pytest.raises(InputError, match="out of memory on cpu with an image of 24x16 pixels"):
        list(Predictor(model, model.model.protocol)([random_image(16, 24)]))


def test_other_runtime_errors_are_not_taken_for_memory():
    model = LimitedMemory(0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(Predictor(model, model.model.protocol, batch_size=2)([random_image(16, 24)]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(precision):
    model, image = golden_data.golden_model(R50_WHOLE), golden_data.vectors(R50_WHOLE)["image"]
    labels = next(Predictor(model, model.protocol, precision=precision)([image]))
    agreement = (labels.numpy() == golden_data.vectors(R50_WHOLE)["label"]).mean()
    assert agreement > 0.9


@pytest.mark.parametrize("height", [1, 2, 7, 65], ids=str)
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_tiny_images(height, mode):
    windowed = {"crop": (33, 33), "stride": (22, 22)} if mode == "slide" else {}
    labels = segment(tiny_model(mode=mode, **windowed), random_image(height, 3))
    assert labels.shape == (height, 3)
