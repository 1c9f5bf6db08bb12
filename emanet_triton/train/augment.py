"""mmsegmentation's training augmentation on one image and its label, from one stream of draws."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from emanet_triton.data.dataset import IGNORE
from emanet_triton.inference.inputs import resize_image
from emanet_triton.inference.views import Size, rescaled

_REDRAWS = 10  # of a crop in which one class covers too much
_BRIGHTNESS = 32
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 18  # of OpenCV's 180 units


@dataclass(frozen=True)
class Augmentation:
    """How images are changed for training (mmseg ``train_pipeline``).

    Attributes:
        crop: (height, width) of the result in pixels.
        scale: (width, height) in pixels, in mmsegmentation's order. Times a random ratio, it is
            the size into which an image is fitted. ``None``: the image's own size.
        ratios: the smallest and the largest ratio.
        most_of_one_class: a crop is drawn again while one class covers this share of it or more;
            1 keeps the first crop.
        flip: how often a crop is mirrored, 0 to 1.
        colors: change brightness, contrast, saturation and hue at random.
    """

    crop: Size
    scale: tuple[int, int] | None
    ratios: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    flip: float = 0.5
    colors: bool = True


class Crop(NamedTuple):
    """A training sample.

    Attributes:
        image: uint8 RGB [H, W, 3] of the crop's size; 0 outside ``size``.
        labels: train ids, uint8 [H, W]; ``IGNORE`` outside ``size``.
        size: (height, width) of the part that the image covers, at the top left.
    """

    image: np.ndarray
    labels: np.ndarray
    size: Size


def augment(
    image: np.ndarray, labels: np.ndarray, how: Augmentation, rng: np.random.RandomState
) -> Crop:
    """Resize, crop, mirror and change the colours of a sample at random, then pad it.

    The draws and their order are those of mmsegmentation 0.x (``Resize``, ``RandomCrop``,
    ``RandomFlip``, ``PhotoMetricDistortion``, ``Pad``), so equal streams give equal samples.

    Args:
        image: uint8 RGB [H, W, 3].
        labels: train ids, uint8 [H, W].
        how: the sizes and probabilities.
        rng: the stream of draws.
    """
    low, high = how.ratios
    ratio = rng.random_sample() * (high - low) + low
    width, height = how.scale or image.shape[1::-1]
    size = rescaled(labels.shape, (max(int(height * ratio), 1), max(int(width * ratio), 1)))
    image = resize_image(image, size)
    labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
    window = _window(labels, how, rng)
    image, labels = image[window], labels[window]
    if rng.rand() < how.flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if how.colors:
        image = _distorted(np.ascontiguousarray(image), rng)
    return _padded(image, labels, how.crop)


def _window(
    labels: np.ndarray, how: Augmentation, rng: np.random.RandomState
) -> tuple[slice, slice]:
    """The place of the crop; an image that is smaller is kept whole."""
    window = _draw_window(labels.shape, how.crop, rng)
    if how.most_of_one_class >= 1:
        return window
    for _ in range(_REDRAWS):
        counts = np.bincount(labels[window].ravel(), minlength=IGNORE + 1)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < how.most_of_one_class:
            break
        window = _draw_window(labels.shape, how.crop, rng)
    return window


def _draw_window(size: Size, crop: Size, rng: np.random.RandomState) -> tuple[slice, slice]:
    top, left = (
        rng.randint(max(length - part, 0) + 1) for length, part in zip(size, crop, strict=True)
    )
    return slice(top, top + crop[0]), slice(left, left + crop[1])


def _distorted(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Change the colours of an image, uint8 RGB [H, W, 3] (mmseg ``PhotoMetricDistortion``)."""
    if rng.randint(2):
        image = _scaled(image, shift=rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    contrast_first = rng.randint(2)
    if contrast_first:
        image = _contrast(image, rng)
    if rng.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _scaled(hsv[..., 1], factor=rng.uniform(*_SATURATION))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.randint(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.randint(-_HUE, _HUE)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else _contrast(image, rng)


def _contrast(image: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return _scaled(image, factor=rng.uniform(*_CONTRAST)) if rng.randint(2) else image


def _scaled(values: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """values * factor + shift in float32, clipped and cut off to uint8."""
    changed = values.astype(np.float32) * np.float32(factor) + np.float32(shift)
    return np.clip(changed, 0, 255).astype(np.uint8)


def _padded(image: np.ndarray, labels: np.ndarray, crop: Size) -> Crop:
    size = labels.shape
    padded_image = np.zeros((*crop, 3), np.uint8)
    padded_labels = np.full(crop, IGNORE, np.uint8)
    inside = slice(size[0]), slice(size[1])
    padded_image[inside], padded_labels[inside] = image, labels
    return Crop(padded_image, padded_labels, size)
