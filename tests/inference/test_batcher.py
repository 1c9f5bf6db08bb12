"""Images that are handed in one by one: their labels, their batches, and what is dropped."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import random_image, tiny_model

from emanet_triton import segment
from emanet_triton.errors import InputError
from emanet_triton.inference.batcher import Batcher, NoLabelsError
from emanet_triton.inference.predictor import Predictor

MODEL = tiny_model()
FOREVER = 600.0  # seconds: a batch that does not fill up within a test


def predictor(model=MODEL, batch_size=2) -> Predictor:
    return Predictor(model, model.protocol, batch_size=batch_size)


@pytest.fixture
def batcher_of():
    """Makes batchers, and the list of the sizes of their batches; closes them at the end."""
    made = []

    def make(load=predictor, wait_s=0.0) -> tuple[Batcher, list[int]]:
        sizes: list[int] = []
        made.append(Batcher(load, wait_s, lambda images, seconds: sizes.append(images)))
        return made[-1], sizes

    yield make
    for each in made:
        each.close()


def test_labels_are_those_of_segment_for_sizes_that_come_at_once(batcher_of):
    batcher, sizes = batcher_of(wait_s=0.01)
    images = [random_image(20 + 4 * (i % 3), 40, seed=i) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        labels = [f.result() for f in pool.map(batcher.submit, images)]
    for image, each in zip(images, labels, strict=True):
        assert np.array_equal(each, segment(MODEL, image))
    assert sum(sizes) == len(images)


def test_images_of_one_size_go_together_in_the_order_of_the_oldest(batcher_of):
    batcher, sizes = batcher_of(wait_s=FOREVER)
    batcher.ready.result()
    first = batcher.submit(random_image(20, 40))
    other = [batcher.submit(random_image(24, 40, seed=i)) for i in range(2)]
    with pytest.raises(TimeoutError):  # the oldest has its turn, and waits for its size
        other[0].result(timeout=0.2)
    assert batcher.waiting() == 3
    second = batcher.submit(random_image(20, 40))
    assert np.array_equal(first.result(), second.result())
    assert [f.result().shape for f in other] == [(24, 40)] * 2
    batcher.close()
    assert sizes == [2, 2]


def test_a_cancelled_image_is_dropped(batcher_of):
    batcher, sizes = batcher_of(wait_s=FOREVER)
    cancelled = batcher.submit(random_image(20, 40))
    assert cancelled.cancel()
    kept = [batcher.submit(random_image(20, 40, seed=i)) for i in (1, 2)]
    assert all(f.result().shape == (20, 40) for f in kept)
    batcher.close()
    assert sizes == [2]


def test_close_segments_what_waits(batcher_of):
    batcher, sizes = batcher_of(wait_s=FOREVER)
    waiting = batcher.submit(random_image(20, 40))
    batcher.close()
    assert waiting.done()
    assert sizes == [1]


def test_a_network_without_finite_logits_is_refused_at_the_start(batcher_of):
    model = tiny_model()
    with torch.no_grad():
        model.decode_head.conv_seg.weight.mul_(torch.inf)
    batcher, _ = batcher_of(lambda: predictor(model))
    with pytest.raises(InputError, match="not finite for a black image"):
        batcher.ready.result()


def test_an_image_without_finite_logits_harms_no_other(batcher_of):
    def load() -> Predictor:
        """Its logits are not finite for the second image of a batch."""
        overflowing = predictor()
        network = overflowing._network

        def overflows(inputs):
            logits = network(inputs)
            logits[1:] = torch.nan
            return logits

        overflowing._network = overflows
        return overflowing

    batcher, _ = batcher_of(load, wait_s=FOREVER)
    image = random_image(20, 40)
    good, bad = batcher.submit(image), batcher.submit(image)
    assert np.array_equal(good.result(), segment(MODEL, image))
    with pytest.raises(NoLabelsError, match="logits of the network are not finite"):
        bad.result()
    assert batcher.broken is None


def test_too_little_memory_and_unexpected_errors(batcher_of, capsys):
    errors = iter([InputError("out of memory"), ZeroDivisionError("a bug"), None])

    class Failing(Predictor):
        def __call__(self, images):
            if error := next(errors) if self.armed else None:
                raise error
            return super().__call__(images)

    failing = Failing(MODEL, MODEL.protocol)
    failing.armed = False
    batcher, _ = batcher_of(lambda: failing)
    batcher.ready.result()
    failing.armed = True
    image = random_image(20, 40)
    with pytest.raises(NoLabelsError, match="out of memory"):
        batcher.submit(image).result()
    assert batcher.broken is None
    with pytest.raises(NoLabelsError, match="a bug"):
        batcher.submit(image).result()
    assert batcher.broken == "ZeroDivisionError: a bug"
    assert "Traceback" in capsys.readouterr().err
    assert np.array_equal(batcher.submit(image).result(), segment(MODEL, image))


def test_a_predictor_that_cannot_be_made(batcher_of):
    def load() -> Predictor:
        assert threading.current_thread() is not threading.main_thread()
        raise InputError("no such checkpoint")

    batcher, _ = batcher_of(load)
    with pytest.raises(InputError, match="no such checkpoint"):
        batcher.ready.result()


def test_an_image_after_the_end_gets_an_error(batcher_of):
    batcher, _ = batcher_of()
    batcher.close()
    with pytest.raises(NoLabelsError, match="no more images"):
        batcher.submit(random_image(20, 40)).result(timeout=60)


def test_images_get_an_error_if_the_network_cannot_be_loaded(batcher_of):
    go_on = threading.Event()

    def load():
        go_on.wait()
        raise InputError("no such file")

    batcher, _ = batcher_of(load)
    before = batcher.submit(random_image(20, 40))
    go_on.set()
    with pytest.raises(InputError, match="no such file"):
        batcher.ready.result(timeout=60)
    for labels in (before, batcher.submit(random_image(20, 40))):
        with pytest.raises(NoLabelsError, match="no more images"):
            labels.result(timeout=60)


def test_an_error_of_the_note_breaks_the_batcher():
    def note(images, seconds):
        raise OSError("full")

    batcher = Batcher(predictor, note=note)
    image = random_image(20, 40)
    assert np.array_equal(batcher.submit(image).result(timeout=60), segment(MODEL, image))
    batcher.close()
    assert batcher.broken == "OSError: full"
    with pytest.raises(NoLabelsError):
        batcher.submit(image).result(timeout=60)
