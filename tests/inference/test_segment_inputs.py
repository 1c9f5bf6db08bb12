"""The images that ``segment`` takes, alone and in lists, and the images that it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from png_files import encoded, exif_of
from tiny_models import random_image, tiny_model

from emanet_triton import fuse, segment
from emanet_triton.errors import InputError
from emanet_triton.inference import images as images_module
from emanet_triton.inference.images import groups
from emanet_triton.inference.predictor import Predictor

RGB = random_image(24, 40)
GREY = RGB[..., 0]
RGBA = np.dstack([RGB, GREY])
GREY_RGB = np.dstack([GREY] * 3)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


ARRAYS = {
    "grey": (GREY, GREY_RGB),
    "grey of one channel": (GREY[..., None], GREY_RGB),
    "RGBA": (RGBA, RGB),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["array", "tensor"])
@pytest.mark.parametrize(("image", "same"), ARRAYS.values(), ids=ARRAYS)
def test_grey_is_repeated_and_alpha_is_dropped(model, image, same, tensor):
    labels = segment(model, torch.from_numpy(image) if tensor else image)
    assert isinstance(labels, torch.Tensor if tensor else np.ndarray)
    np.testing.assert_array_equal(np.asarray(labels), segment(model, same))


PALETTE = Image.fromarray(RGB).quantize(9)
PALETTE.info["transparency"] = bytes(9)
PIL_IMAGES = {
    "RGB": (Image.fromarray(RGB), RGB),
    "grey": (Image.fromarray(GREY), GREY_RGB),
    "1 bit": (Image.fromarray(GREY > 99), np.dstack([np.where(GREY > 99, 255, 0)] * 3)),
    "RGBA": (Image.fromarray(RGBA), RGB),
    "palette": (PALETTE, np.asarray(PALETTE.convert("RGBA"))[..., :3]),
    "CMYK": (
        Image.fromarray(RGB).convert("CMYK"),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
    ),
}


@pytest.mark.parametrize(("image", "same"), PIL_IMAGES.values(), ids=PIL_IMAGES)
@pytest.mark.filterwarnings("error")
def test_pil_images_are_converted_to_rgb(model, image, same):
    labels, probabilities = segment(model, image, return_probabilities=True)
    assert isinstance(labels, np.ndarray)
    assert isinstance(probabilities, np.ndarray)
    np.testing.assert_array_equal(labels, segment(model, same.astype(np.uint8)))


def test_a_path_is_turned_by_exif_and_a_pil_image_is_not(model, tmp_path):
    path = tmp_path / "street.jpg"
    path.write_bytes(encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + exif_of(6)))
    with Image.open(path) as image:
        stored = np.asarray(image)
        turned = np.rot90(stored, -1)
        np.testing.assert_array_equal(segment(model, image), segment(model, stored))
    for given in (path, str(path)):
        labels = segment(model, given)
        assert isinstance(labels, np.ndarray)
        np.testing.assert_array_equal(labels, segment(model, turned))


def test_importing_the_package_and_segmenting_arrays_imports_no_pillow():
    code = (
        "import sys, numpy, emanet_triton; m = emanet_triton.create_model('emanet_demo');"
        "emanet_triton.segment(m.eval(), numpy.zeros((16, 16, 3), numpy.uint8));"
        "assert 'PIL' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def sizes_of(monkeypatch) -> list[tuple[int, ...]]:
    """The (images, height, width) of each batch that goes through a Predictor from now on."""
    seen, results = [], Predictor.results

    def spied(self, images, **options):
        found = results(self, images, **options)
        seen.append((len(found[0]), *images[0].shape[:2]))
        return found

    monkeypatch.setattr(Predictor, "results", spied)
    return seen


def test_a_list_gives_a_list_in_its_order(model, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    given = [RGB, torch.from_numpy(random_image(16, 16, 1)), Image.fromarray(GREY), path]
    want = [segment(model, image) for image in given]
    for images in (given, tuple(given)):
        got = segment(model, images, batch_size=2)
        assert isinstance(got, list)
        assert [type(labels) for labels in got] == [type(labels) for labels in want]
        for labels, wanted in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(labels), np.asarray(wanted))
    pairs = segment(model, given, return_probabilities=True, batch_size=3)
    for (labels, probabilities), wanted in zip(pairs, want, strict=True):
        np.testing.assert_array_equal(np.asarray(labels), np.asarray(wanted))
        assert probabilities.shape == (19, *labels.shape)
        assert type(probabilities) is type(labels)


def test_an_empty_list_gives_an_empty_list(model):
    assert segment(model, []) == segment(model, (), return_probabilities=True) == []
    with pytest.raises(ValueError, match="training mode"):
        segment(tiny_model().train(), [])


def test_images_of_equal_size_run_together(model, monkeypatch):
    seen = sizes_of(monkeypatch)
    images = [random_image(*size) for size in [(16, 24), (8, 8)] * 3 + [(16, 24)]]
    segment(model, images, batch_size=3)
    assert seen == [(3, 16, 24), (3, 8, 8), (1, 16, 24)]
    seen.clear()
    segment(model, images)
    assert [count for count, *_ in seen] == [1] * 7


def test_all_windows_of_several_images():
    windowed = tiny_model(mode="slide", crop=(32, 32), stride=(24, 24))
    images = [random_image(40, 72, seed) for seed in range(3)]
    want = [segment(windowed, image, return_probabilities=True)[1] for image in images]
    got = segment(windowed, images, return_probabilities=True, batch_size=3)
    for (_, probabilities), wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(probabilities, wanted, rtol=0, atol=1e-3)


def test_a_batch_that_memory_is_too_small_for(model, monkeypatch):
    """``Predictor.results`` then segments the first images only."""
    images = [random_image(16, 24, seed) for seed in range(5)]
    want = [segment(model, image) for image in images]
    results = Predictor.results
    monkeypatch.setattr(
        Predictor, "results", lambda self, images, **options: results(self, images[:2], **options)
    )
    got = segment(model, images, batch_size=4)
    np.testing.assert_array_equal(got, want)


def test_a_gpu_runs_eight_images_of_a_list_at_once(model):
    module = sys.modules["emanet_triton.inference.segment"]
    predictor = Predictor(model, model.protocol)
    predictor.device, predictor.inputs_at_once = torch.device("cuda"), 64
    for given, images, inputs in ((None, 8, 64), (1, 1, 64), (100, 100, 100)):
        module._set_batch_size(predictor, given)
        assert (predictor.images_at_once, predictor.inputs_at_once) == (images, inputs)


def test_few_images_of_a_long_list_are_held(monkeypatch):
    """Even if no two files have one size."""
    read = []
    monkeypatch.setattr(
        images_module, "pixels", lambda image, name: read.append(image) or np.zeros(image, np.uint8)
    )
    sizes = [(4, 4 + i, 3) for i in range(100)]
    most, done = 0, 0
    for group in groups(sizes, [""] * 100, 3):
        most = max(most, len(read) - done)
        done += len(group)
    assert done == 100
    assert most == 12


WANTED = (
    "image must be uint8 RGB [H, W, 3], grey [H, W] or RGBA [H, W, 4], an array or a tensor, a PIL "
    "image or the path of a file, got "
)
IMAGES = {
    "float": (np.zeros((4, 4, 3), np.float32), "float32 [4, 4, 3]"),
    "bool": (np.zeros((4, 4), bool), "bool [4, 4]"),
    "two channels": (np.zeros((4, 4, 2), np.uint8), "uint8 [4, 4, 2]"),
    "one row": (np.zeros(4, np.uint8), "uint8 [4]"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "uint8 [0, 4, 3]"),
    "empty grey": (np.zeros((4, 0), np.uint8), "uint8 [4, 0]"),
    "batch": (
        np.zeros((2, 4, 4, 3), np.uint8),
        "uint8 [2, 4, 4, 3]: list(images) makes a list of its images",
    ),
    "chw": (
        torch.zeros((3, 4, 5), dtype=torch.uint8),
        "torch.uint8 [3, 4, 5], whose first axis has the channels",
    ),
    "int64": (torch.zeros((4, 4, 3), dtype=torch.int64), "torch.int64 [4, 4, 3]"),
    "meta": (
        torch.zeros((4, 4, 3), dtype=torch.uint8, device="meta"),
        "torch.uint8 [4, 4, 3] on the meta device",
    ),
    "sparse": (
        torch.zeros((4, 4, 3), dtype=torch.uint8).to_sparse(),
        "torch.uint8 [4, 4, 3] that is not dense: tensor.to_dense() makes it so",
    ),
    "none": (None, "None, as cv2.imread returns it for a file that it cannot read"),
    **{
        f"PIL {mode}": (
            Image.new(mode, (5, 4)),
            f"a PIL image of 5x4 pixels and mode {mode}, which has more than 8 bits a channel",
        )
        for mode in ("I", "F", "I;16", "I;16B")
    },
    "PIL empty": (Image.new("RGB", (0, 4)), "a PIL image of 0x4 pixels and mode RGB"),
    "list in a list": ([[0, 0, 0]], "a list"),
    "bytes": (b"street.png", "a bytes"),
    "generator": ((image for image in [RGB]), "a generator"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_image(model, name):
    image, got = IMAGES[name]
    with pytest.raises(ValueError) as raised:
        segment(model, [RGB, image])
    assert str(raised.value) == f"image 1 of the list: {WANTED}{got}"
    if not isinstance(image, list):
        with pytest.raises(ValueError) as raised:
            segment(model, image)
        assert str(raised.value) == WANTED + got


def test_all_images_of_a_list_are_checked_before_any_runs(model, monkeypatch):
    seen = sizes_of(monkeypatch)
    with pytest.raises(ValueError, match="image 2 of the list: image must be"):
        segment(model, [RGB, "none.png", None])
    assert seen == []


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", True])
def test_bad_batch_size(model, batch_size, monkeypatch):
    module = sys.modules["emanet_triton.inference.segment"]
    monkeypatch.setattr(module, "verified_fuse", None)  # on a GPU its trials may take minutes
    with pytest.raises(ValueError) as raised:
        segment(model, [RGB], fuse=True, batch_size=batch_size)
    assert str(raised.value) == (
        f"batch_size must be a positive integer, or None, got {batch_size!r}"
    )


def test_a_file_that_cannot_be_read_is_named(model, tmp_path):
    path = tmp_path / "street.jpg"
    for image in (path, str(path), [RGB, path]):
        with pytest.raises(
            InputError, match=r"street\.jpg: there is no such file; expected a JPEG"
        ):
            segment(model, image)
    path.write_bytes(encoded(Image.fromarray(RGB), "JPEG")[:-50])
    with pytest.raises(InputError, match=r"street\.jpg: not a readable JPEG \(.*truncated"):
        segment(model, [path])
    with Image.open(path) as image, pytest.raises(InputError) as raised:
        segment(model, [RGB, image])
    assert str(raised.value).startswith("image 1 of the list: not a readable PIL image (image file")


def test_a_pil_mode_that_does_not_convert(model):
    with pytest.raises(ValueError) as raised:
        segment(model, Image.new("La", (4, 4)))
    assert str(raised.value) == (
        "this image must be a PIL image of a mode that converts to RGB, got La"
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_image_whose_logits_are_not_finite_is_named(fused, tmp_path):
    model = tiny_model()
    network = fuse(model) if fused else model
    next(network.decode_head.conv_seg.parameters()).data.fill_(float("nan"))
    path = tmp_path / "street.png"
    path.write_bytes(encoded(Image.fromarray(RGB)))
    cases = {"this image": RGB, "image 0 of the list": [RGB, RGB], str(path): path}
    for name, image in (*cases.items(), (str(path), [path])):
        with pytest.raises(InputError) as raised:
            segment(network, image)
        assert str(raised.value) == f"the logits of the network are not finite for {name}"


def test_a_path_is_any_path(model, tmp_path):
    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path / "a.png")

    Path(Named()).write_bytes(encoded(Image.fromarray(RGB)))
    np.testing.assert_array_equal(segment(model, Named()), segment(model, RGB))
