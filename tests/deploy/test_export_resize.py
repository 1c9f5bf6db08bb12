"""The resizes that are exported equal OpenCV's and PyTorch's."""

import random

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from emanet_triton.deploy.resize import (
    _centres,
    exactly_fitted,
    fitted,
    resize_images,
    resize_matrix,
)
from emanet_triton.inference.views import rescaled

SIZES = [
    ((37, 51), (64, 128)),
    ((64, 128), (64, 128)),
    ((64, 128), (32, 64)),  # OpenCV averages four pixels here
    ((31, 47), (62, 94)),
    ((1, 5), (7, 3)),
    ((5, 1), (3, 9)),
    ((300, 200), (11, 7)),
    ((720, 1280), (1024, 1820)),
    ((1080, 1920), (1024, 1820)),
]


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_images_are_resized_as_by_opencv(size, target):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *size, 3), dtype=np.uint8)
    resized = resize_images(torch.from_numpy(images), target).numpy()
    for image, ours in zip(images, resized, strict=True):
        expected = cv2.resize(image, target[::-1], interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(ours, expected)


def test_random_sizes_are_resized_as_by_opencv():
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width, *target = (int(side) for side in rng.integers(1, 150, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = cv2.resize(image, target[::-1], interpolation=cv2.INTER_LINEAR)
        ours = resize_images(torch.from_numpy(image)[None], tuple(target))[0].numpy()
        np.testing.assert_array_equal(ours, expected, err_msg=f"{image.shape} to {target}")


@pytest.mark.parametrize(("n_in", "n_out"), [(1080, 1025), (1920, 1822), (511, 2038), (6000, 1538)])
def test_a_runtime_in_float32_finds_the_same_neighbours(n_in, n_out):
    places = torch.arange(n_out)
    exact = (2 * places.double() + 1) * n_in / (2 * n_out) - 0.5
    in_float32 = _centres(places.float(), n_in, n_out)
    assert in_float32.dtype == torch.float32
    # The sum of a whole number and a rounded fraction is seldom rounded otherwise.
    assert (in_float32 != exact.float()).float().mean() < 0.01


@pytest.mark.parametrize("target", [(1024, 2048), (1025, 2049), (512, 512), (65, 129)])
def test_an_image_is_fitted_as_by_mmcv(target):
    numbers = random.Random(2)
    for _ in range(5000):
        size = numbers.randint(1, 6143), numbers.randint(1, 6143)
        assert exactly_fitted(size, target) == rescaled(size, target), size


def test_a_known_size_is_fitted_as_by_mmcv_also_where_a_half_is_rounded():
    size, target = (2000, 3000), (1025, 2049)
    assert fitted(size, target) == rescaled(size, target) == (1025, 1537)
    assert exactly_fitted(size, target) == (1025, 1538)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(7, 49), (9, 9), (1, 6), (6, 1), (12, 5), (97, 769)])
def test_the_matrix_of_a_resize(n_in, n_out, align_corners):
    x = torch.eye(n_in, dtype=torch.float64)[None]
    expected = F.interpolate(x[None], (n_in, n_out), mode="bilinear", align_corners=align_corners)[
        0, 0
    ].mT
    matrix = resize_matrix(n_in, n_out, align_corners, x)
    torch.testing.assert_close(matrix.double(), expected, rtol=0, atol=1e-6)
