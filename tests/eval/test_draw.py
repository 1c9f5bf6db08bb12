import math
from itertools import product

import cv2
import numpy as np
import pytest

from emanet_triton.data.cityscapes import CITYSCAPES, CLASSES
from emanet_triton.data.dataset import IGNORE, Class
from emanet_triton.eval.draw import side_by_side, wrong_color

PADDING = 4
WRONG = wrong_color(CLASSES)


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sky above a road, a car that the prediction lacks, and an ignored strip at the bottom."""
    label = np.full((height, width), 10, np.uint8)
    label[height // 2 :] = 0
    prediction = label.copy()
    label[height // 4 : height // 2, width // 4 : width // 2] = 13
    label[-(height // 4) :] = IGNORE
    image = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return image, prediction, label


def holds_swatch(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    """Whether there is a whole swatch: single pixels of letters can have the colour, too."""
    return np.count_nonzero((picture == color).all(-1)) >= 20 * 20


def test_panels_of_an_image_of_its_own_size():
    image, prediction, label = scene(256, 512)
    picture = side_by_side(image, prediction, label, CLASSES)
    assert picture.dtype == np.uint8
    caption = 20
    x, y = 512 + PADDING, 256 + caption + PADDING
    panel = [
        picture[top : top + 256, left : left + 512].astype(int)
        for top in (PADDING + caption, PADDING + caption + y)
        for left in (PADDING, PADDING + x)
    ]
    np.testing.assert_array_equal(panel[0], image)

    palette = np.zeros((256, 3))
    palette[:19] = [c.color for c in CLASSES]
    for drawn, ids in ((panel[1], prediction), (panel[2], label)):
        np.testing.assert_allclose(drawn, 0.65 * palette[ids] + 0.35 * image, atol=0.51)

    ignored = label == IGNORE
    wrong = (prediction != label) & ~ignored
    right = ~wrong & ~ignored
    red, green, _ = np.moveaxis(panel[3], -1, 0)
    assert (red[right] == green[right]).all()
    assert (red[right] >= 128).all()
    np.testing.assert_allclose(panel[3][wrong], np.broadcast_to(WRONG, (wrong.sum(), 3)), atol=40)
    assert (panel[3][ignored] < 64).all()


def test_legend_lists_the_classes_that_are_there():
    image, prediction, label = scene(256, 512)
    image[:] = 128
    legend = side_by_side(image, prediction, label, CLASSES)[2 * (256 + 20 + PADDING) :]
    shown = [c.name for c in CLASSES if holds_swatch(legend, c.color)]
    assert shown == ["road", "sky", "car"]
    assert holds_swatch(legend, WRONG)


PALETTES = {
    "Cityscapes": CITYSCAPES.classes,
    "cyan": [Class("sea", (0, 255, 255)), Class("land", (0, 128, 0))],
    "primary": [Class(str(rgb), rgb) for rgb in product((0, 255), repeat=3)],
}


@pytest.mark.parametrize("classes", PALETTES.values(), ids=PALETTES)
def test_the_colour_of_wrong_pixels_is_unlike_that_of_any_class(classes):
    distances = [math.dist(wrong_color(classes), c.color) for c in classes]
    assert min(distances) > 120


def test_without_label():
    image, prediction, _ = scene(256, 512)
    picture = side_by_side(image, prediction, None, CLASSES)
    assert picture.shape[1] == 2 * 512 + 3 * PADDING
    legend = picture[256 + 20 + 2 * PADDING :]
    shown = [c.name for c in CLASSES if holds_swatch(legend, c.color)]
    assert shown == ["road", "sky"]
    assert not holds_swatch(legend, WRONG)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (16, 16), (5, 300), (300, 5), (128, 256), (1024, 2048)],
    ids=["pixel", "tiny", "flat", "tall", "small", "Cityscapes"],
)
def test_any_size(size):
    image, prediction, label = scene(*size)
    before = [array.copy() for array in (image, prediction, label)]
    picture = side_by_side(image, prediction, label, CLASSES)
    zoom = max(1, -(-320 // max(size)))
    assert picture.shape[0] > 2 * zoom * size[0]
    assert picture.shape[1] >= 2 * zoom * size[1]
    for array, original in zip((image, prediction, label), before, strict=True):
        np.testing.assert_array_equal(array, original)


def test_all_classes_fit_into_the_legend():
    prediction = np.arange(19, dtype=np.uint8).repeat(19).reshape(19, 19)
    image = np.full((19, 19, 3), 128, np.uint8)
    picture = side_by_side(image, prediction, None, CLASSES)
    assert all(holds_swatch(picture, c.color) for c in CLASSES)
    # The text does not reach the last column, which is white in all rows of the legend.
    assert (picture[-40:, -1] == 255).all()


def test_picture_is_contiguous_for_encoding():
    assert cv2.imencode(".png", side_by_side(*scene(16, 16), CLASSES))[0]


def test_sizes_must_agree():
    image, prediction, label = scene(16, 16)
    with pytest.raises(ValueError, match="differs in size from the image"):
        side_by_side(image, prediction[:8], label, CLASSES)
    with pytest.raises(ValueError, match="differs in size from the image"):
        side_by_side(image, prediction, label[:8], CLASSES)
