"""The weights of the classes in the loss."""

import numpy as np
import pytest

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import write_png
from emanet_triton.train.check import class_weights
from emanet_triton.train.group import ALONE

ROAD, CAR = 7, 26  # label ids
TRAIN_IDS = {ROAD: 0, CAR: 13}


def weights(root, rows, balance=0.5):
    """The class weights if every label has ``rows`` rows of each label id."""
    samples = CITYSCAPES.find_samples(root, "train")
    column = np.repeat(np.array(list(rows), np.uint8), list(rows.values()))
    for sample in samples:
        write_png(sample.label, np.tile(column[:, None], (1, 128)))
    return class_weights(samples, CITYSCAPES, balance, ALONE, workers=0).tolist()


def test_a_class_without_pixels_does_not_change_the_others(own_scenes):
    found = weights(own_scenes, {ROAD: 48, CAR: 16})
    car, road = (found.pop(TRAIN_IDS[number]) for number in (CAR, ROAD))
    assert (road + car) / 2 == pytest.approx(1)
    assert car / road == pytest.approx(3**0.5)  # it has a third of the pixels
    assert set(found) == {1.0}


@pytest.mark.parametrize("balance", [400, 1e30])
def test_a_large_balance_leaves_the_rarest_class_alone(own_scenes, balance):
    found = weights(own_scenes, {ROAD: 48, CAR: 16}, balance)
    assert (found[TRAIN_IDS[ROAD]], found[TRAIN_IDS[CAR]]) == (pytest.approx(0), 2)


def test_labels_without_classes_weigh_the_same(own_scenes):
    assert set(weights(own_scenes, {0: 64})) == {1.0}
