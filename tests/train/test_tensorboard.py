"""What a training writes for TensorBoard, read by TensorBoard's own reader."""

import warnings

import pytest
from small_trainings import options

from emanet_triton.train.__main__ import main


@pytest.fixture
def events():
    """The reader: a function from a folder to the events in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        accumulator = EventAccumulator(str(folder))
        accumulator.Reload()
        return accumulator

    return read


def test_losses_scores_and_pictures(scenes, tmp_path, events):
    assert main(options(scenes, out=tmp_path, tensorboard=True)) == 0
    found = events(tmp_path / "tensorboard")
    scalars = set(found.Tags()["scalars"])
    assert {"train/loss", "train/lr", "train/images/s", "val/mIoU", "val IoU/road"} <= scalars
    assert [event.step for event in found.Scalars("train/loss")] == [2, 4]
    assert [event.step for event in found.Scalars("val/mIoU")] == [2, 4]
    pictures = found.Tags()["images"]
    assert len(pictures) == 2  # of both validation images
    assert {event.step for event in found.Images(pictures[0])} == {2, 4}


def test_resumed_events_continue(scenes, tmp_path, events):
    long = {"tensorboard": True, "log_every": 1, "val_split": "none"}
    assert main(options(scenes, out=tmp_path, **long, iterations=4)) == 0
    assert main(options(scenes, out=tmp_path, **long, iterations=4, resume=True)) == 0
    steps = [event.step for event in events(tmp_path / "tensorboard").Scalars("train/loss")]
    assert steps == [1, 2, 3, 4]
