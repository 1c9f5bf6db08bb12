"""Which samples an iteration takes, and that nobody's order or number changes them."""

import itertools
import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.train.augment import Augmentation
from emanet_triton.train.samples import Batches, Crops, Draw, load

HOW = Augmentation(crop=(32, 64), scale=(128, 64))


def first(batches, count):
    return list(itertools.islice(batches, count))


@pytest.fixture
def crops(scenes):
    return Crops(CITYSCAPES.find_samples(scenes, "train"), CITYSCAPES, HOW, seed=3)


def test_each_epoch_has_every_image_once_in_another_order():
    draws = [draw for batch in first(Batches(6, 4, seed=0), 6) for draw in batch]
    epochs = [[draw.image for draw in draws[i : i + 6]] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [draw.position for draw in draws] == list(range(24))


@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_from_any_batch_on(start):
    assert first(Batches(6, 4, 0, first=start), 5) == first(Batches(6, 4, 0), 5 + start)[start:]


def test_ranks_take_together_what_one_rank_takes():
    alone = first(Batches(6, 4, 0), 6)
    ranks = [first(Batches(6, 2, 0, rank, 2), 6) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(b) for b in alone]


def test_an_odd_number_of_images_on_two_ranks():
    ranks = [first(Batches(5, 3, 0, rank, 2), 2) for rank in range(2)]
    images = Counter(draw.image for rank in ranks for batch in rank for draw in batch)
    assert sum(images.values()) == 12
    assert set(images) == set(range(5))
    positions = [draw.position for rank in ranks for batch in rank for draw in batch]
    assert sorted(positions) == list(range(12))


def test_one_image_is_enough():
    assert first(Batches(1, 3, 0), 2) == [
        [Draw(0, 0), Draw(0, 1), Draw(0, 2)],
        [Draw(0, 3), Draw(0, 4), Draw(0, 5)],
    ]


def test_another_seed_is_another_order():
    assert first(Batches(50, 50, 0), 1) != first(Batches(50, 50, 1), 1)


def test_a_samples_stream_depends_on_its_position_and_the_seed_alone(crops, scenes):
    one = crops[Draw(0, 7)]
    crops[Draw(1, 8)]
    again = crops[Draw(0, 7)]
    assert (one.image == again.image).all()
    assert not np.array_equal(one.image, crops[Draw(0, 8)].image)
    other = Crops(crops.samples, CITYSCAPES, HOW, seed=4)
    assert not np.array_equal(one.image, other[Draw(0, 7)].image)
    assert not np.array_equal(one.image, crops[Draw(0, 7 + 2**32)].image)


def test_workers_change_nothing(crops):
    batches = Batches(len(crops), 2, seed=0)
    alone, two = (first(load(crops, batches, workers, False), 3) for workers in (0, 2))
    for ours, theirs in zip(alone, two, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.sizes, theirs.sizes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_is_a_problem_of_its_batch(own_scenes, workers):
    samples = CITYSCAPES.find_samples(own_scenes, "train")
    samples[2].label.write_bytes(b"damaged")
    batches = load(Crops(samples, CITYSCAPES, HOW, 0), Batches(6, 1, 0), workers, False)
    problems = [batch.problem for batch in first(batches, 6)]
    (problem,) = filter(None, problems)
    assert problem.startswith(f"{samples[2].label}: not a readable PNG")


def test_the_terminals_ctrl_c_is_left_to_the_process_that_waits(crops):
    batches = load(crops, Batches(len(crops), 1, 0), 1, False)
    next(batches)
    (worker,) = (process.pid for process in batches._workers)
    os.kill(worker, signal.SIGINT)
    assert len(first(batches, 5)) == 5
