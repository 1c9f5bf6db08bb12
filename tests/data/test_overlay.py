"""The overlay of a prediction: colours, legend, and classes that are left out."""

import numpy as np
import pytest
import torch

from emanet_triton.data.cityscapes import CLASSES
from emanet_triton.data.overlay import Text, class_names, colored, overlay, palette, with_legend
from emanet_triton.errors import InputError

NOT_FINITE = 255


def scene(height: int = 240, width: int = 480) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with sky above, road below, and a car."""
    image = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    labels = np.full((height, width), 10, np.uint8)
    labels[height // 2 :] = 0
    labels[height // 3 : height // 2, width // 3 : width // 2] = 13
    return image, labels


def holds_swatch(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return np.count_nonzero((picture == color).all(-1)) >= 20 * 20


def test_palette_and_names_have_the_order_of_the_labels():
    assert palette().dtype == np.uint8
    assert class_names()[13] == "car"
    assert palette()[13].tolist() == [0, 0, 142]
    assert len(palette()) == len(class_names()) == 19


def test_colors_are_blended_and_nothing_else_changes():
    image, labels = scene()
    before = image.copy(), labels.copy()
    for alpha in (0.0, 0.3, 1.0):
        drawn = overlay(image, labels, alpha=alpha, legend=False)
        wanted = alpha * palette()[labels] + (1 - alpha) * image
        np.testing.assert_allclose(drawn, wanted, atol=0.51)
        assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_pixels_without_a_class_keep_their_colour():
    image, labels = scene()
    labels[:50] = NOT_FINITE
    drawn = overlay(image, labels, legend=False)
    np.testing.assert_array_equal(drawn[:50], image[:50])
    assert (colored(labels)[:50] == 0).all()


def test_only_the_named_classes_are_painted_and_in_the_legend():
    image, labels = scene()
    drawn = overlay(image, labels, classes=["car", "train"])
    np.testing.assert_array_equal(drawn[:240][labels != 13], image[labels != 13])
    assert (drawn[:240][labels == 13] != image[labels == 13]).any()
    shown = [c.name for c in CLASSES if holds_swatch(drawn[240:], c.color)]
    assert shown == ["car"]
    colors = colored(labels, classes=["car"])
    assert (colors[labels == 13] == palette()[13]).all()
    assert (colors[labels != 13] == 0).all()


def test_the_legend_lists_the_classes_that_are_there():
    image, labels = scene()
    drawn = overlay(image, labels)
    assert drawn.shape[1] == 480
    np.testing.assert_array_equal(drawn[:240], overlay(image, labels, legend=False))
    shown = [c.name for c in CLASSES if holds_swatch(drawn[240:], c.color)]
    assert shown == ["road", "sky", "car"]


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (64, 96), (20000, 3)])
def test_a_small_picture_is_enlarged_by_a_whole_number(size):
    image, labels = scene(*size)
    zoom = max(1, -(-320 // max(size)))
    drawn = overlay(image, labels)
    plain = overlay(image, labels, legend=False)
    enlarged = plain.repeat(zoom, axis=0).repeat(zoom, axis=1)
    np.testing.assert_array_equal(drawn[: zoom * size[0], : zoom * size[1]], enlarged)


def test_no_legend_without_entries():
    image, labels = scene()
    np.testing.assert_array_equal(with_legend(image, []), image)
    np.testing.assert_array_equal(overlay(image, labels, classes=["train"]), image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i, n: (i[:, :, 0], n),
            r"image must be .* uint8 \[H, W, 3\], got uint8 \[240, 480\]",
        ),
        (lambda i, n: (i / 255, n), "image must be .* got float64"),
        (lambda i, n: (torch.from_numpy(i), n), "image must be a NumPy array, .* got a Tensor"),
        (lambda i, n: (i, n.astype(int)), r"labels must be .* uint8 \[H, W\], got int64"),
        (lambda i, n: (i, n[None]), r"labels must be .*, got uint8 \[1, 240, 480\]"),
    ],
)
def test_other_arrays_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        overlay(*change(*scene()))


def test_wrong_arguments_are_named():
    image, labels = scene()
    with pytest.raises(ValueError, match="differ in size from the image"):
        overlay(image, labels[:8])
    with pytest.raises(ValueError, match=r"alpha must be in 0 to 1, got 1\.5"):
        overlay(image, labels, alpha=1.5)
    with pytest.raises(ValueError, match="no class of Cityscapes: cars, roads; expected some of"):
        overlay(image, labels, classes=["roads", "car", "cars"])
    with pytest.raises(ValueError, match="no class of Cityscapes: cars"):
        colored(labels, classes=["cars"])


def test_labels_of_another_data_set_are_not_drawn_in_the_wrong_colours():
    image, labels = scene()
    labels[:8] = 144
    with pytest.raises(
        ValueError, match="labels hold 144, but Cityscapes has 19 classes; give the"
    ):
        overlay(image, labels)
    drawn = overlay(image, labels, "ade20k", legend=False, alpha=1)
    np.testing.assert_array_equal(drawn, palette("ade20k")[labels])
    assert class_names("ade20k")[144] == "bulletin board"
    with pytest.raises(
        InputError, match="unknown data set 'ade'; expected one of: cityscapes, voc"
    ):
        palette("ade")


def test_text_grows_with_the_picture_up_to_a_limit():
    """Else a picture of 200000 x 2 pixels would need gigabytes for its legend."""
    lines = [Text.for_width(width).line for width in (100, 4800, 9600, 200_000)]
    assert lines == [20, 100, 200, 200]
