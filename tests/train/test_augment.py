"""The augmentation against what mmsegmentation 0.30.0 made of the same image and seeds."""

import numpy as np
import pytest
from golden_data import vectors

from emanet_triton.data.dataset import IGNORE
from emanet_triton.train.augment import Augmentation, augment

MEAN = (124, 116, 104)  # how mmsegmentation's padding, 0 after normalisation, looks in the vectors
SETTINGS = {
    "512x1024": Augmentation(crop=(64, 128), scale=(256, 128)),
    "769x769": Augmentation(crop=(97, 97), scale=(257, 129)),
    "large_crop": Augmentation(crop=(160, 300), scale=(256, 128)),
}
PLAIN = Augmentation(
    crop=(24, 32), scale=None, ratios=(1, 1), most_of_one_class=1, flip=0, colors=False
)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", SETTINGS)
def test_golden(name, seed):
    golden = vectors("augment")
    rng = np.random.RandomState(seed)
    crop = augment(golden["image"], golden["label"], SETTINGS[name], rng)
    height, width = crop.size
    outside = np.ones(crop.labels.shape, bool)
    outside[:height, :width] = False
    assert (crop.image[outside] == 0).all()
    assert (crop.labels[outside] == IGNORE).all()
    image = crop.image.copy()
    image[outside] = MEAN
    assert (image == golden[f"{name}_{seed}_image"]).all()
    assert (crop.labels == golden[f"{name}_{seed}_label"]).all()
    assert rng.randint(2**31) == golden[f"{name}_{seed}_draws"]  # equally many draws


def test_the_golden_crops_cover_padding_and_whole_crops():
    golden = vectors("augment")
    sizes = [
        augment(golden["image"], golden["label"], how, np.random.RandomState(seed)).size == how.crop
        for how in SETTINGS.values()
        for seed in range(6)
    ]
    assert 0 < sum(sizes) < len(sizes)


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (24, 32, 3), np.uint8), rng.integers(0, 19, (24, 32), np.uint8)


def test_nothing_random_is_left_when_all_is_switched_off(sample):
    crop = augment(*sample, PLAIN, np.random.RandomState(0))
    assert (crop.image == sample[0]).all()
    assert (crop.labels == sample[1]).all()
    assert crop.size == (24, 32)


def test_always_mirrored(sample):
    how = Augmentation(
        crop=(24, 32), scale=None, ratios=(1, 1), most_of_one_class=1, flip=1, colors=False
    )
    crop = augment(*sample, how, np.random.RandomState(0))
    assert (crop.image == sample[0][:, ::-1]).all()
    assert (crop.labels == sample[1][:, ::-1]).all()


def test_a_crop_of_one_class_is_drawn_again():
    labels = np.zeros((64, 640), np.uint8)
    labels[:, 600:] = 1
    image = np.zeros((64, 640, 3), np.uint8)
    how = {"crop": (64, 64), "scale": None, "ratios": (1, 1), "flip": 0, "colors": False}

    def mixed(most):
        crops = [
            augment(
                image,
                labels,
                Augmentation(**how, most_of_one_class=most),
                np.random.RandomState(seed),
            )
            for seed in range(40)
        ]
        return sum(len(np.unique(crop.labels)) == 2 for crop in crops)

    assert mixed(1) < mixed(0.9)


def test_an_image_without_any_class_ends(sample):
    how = Augmentation(crop=(8, 8), scale=None)
    crop = augment(sample[0], np.full((24, 32), IGNORE, np.uint8), how, np.random.RandomState(0))
    assert (crop.labels == IGNORE).all()


def test_a_very_small_ratio_leaves_a_pixel(sample):
    how = Augmentation(crop=(8, 8), scale=None, ratios=(1e-6, 1e-6))
    assert augment(*sample, how, np.random.RandomState(0)).size == (1, 1)
