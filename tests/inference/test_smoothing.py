"""The average of probabilities over frames."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_model

from emanet_triton.inference.predictor import NOT_FINITE, Predictor
from emanet_triton.inference.smoothing import Smoothing

FRAMES, CLASSES, POSITIONS = 5, 7, 12


def logits(scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scale * torch.randn(FRAMES, CLASSES, POSITIONS, generator=generator)


def wanted(frames: torch.Tensor, weight: float) -> torch.Tensor:
    averages: list[torch.Tensor] = []
    for frame in frames.double():
        new = frame.softmax(0)
        averages.append(weight * averages[-1] + (1 - weight) * new if averages else new)
    return torch.stack(averages)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 0.99])
def test_it_is_the_exponential_average_of_probabilities(weight):
    got = Smoothing(weight)(logits())
    torch.testing.assert_close(got.double().exp(), wanted(logits(), weight), rtol=1e-5, atol=1e-7)


def test_frames_one_by_one_are_as_good_as_together():
    one = Smoothing(0.8)
    parts = torch.cat([one(frame[None]) for frame in logits()])
    assert torch.equal(parts, Smoothing(0.8)(logits()))


def test_half_precision_is_averaged_in_float32():
    frames = logits().bfloat16()
    got = Smoothing(0.8)(frames)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double().exp(), wanted(frames, 0.8), rtol=1e-5, atol=1e-7)


def test_probabilities_of_zero_stay_finite():
    assert Smoothing(0.5)(logits(scale=1e4)).isfinite().all()


def test_another_size_begins_anew():
    smoothing = Smoothing(0.8)
    smoothing(logits())
    frames = logits()[:, :, :5]
    assert torch.equal(smoothing(frames), Smoothing(0.8)(frames))


def test_a_frame_that_is_not_finite_is_passed_on_and_forgotten():
    smoothing, bad = Smoothing(0.8), logits()[:1].clone()
    bad[0, 3, 4] = torch.nan
    smoothing(logits())
    torch.testing.assert_close(smoothing(bad), bad, equal_nan=True)
    assert torch.equal(smoothing(logits()), Smoothing(0.8)(logits()))


@pytest.mark.parametrize("weight", [-0.1, 1.0, 2.0, float("nan")])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="weight must be at least 0 and less than 1"):
        Smoothing(weight)


@pytest.mark.parametrize("ms_flip", [False, True])
def test_a_weight_of_zero_changes_no_label(ms_flip):
    predictor = Predictor(tiny_model(), tiny_model().protocol, ms_flip=ms_flip)
    image = np.random.RandomState(0).randint(0, 256, (50, 70, 3)).astype(np.uint8)
    labels, before = predictor.results([image], probabilities=True)
    smooth, after = predictor.results([image], probabilities=True, adjust=Smoothing(0))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)
    best, second = before.topk(2, dim=1).values.unbind(1)
    assert torch.equal(smooth[best - second > 1e-4], labels[best - second > 1e-4])
    assert not (smooth == NOT_FINITE).any()


def test_labels_follow_the_average():
    """One frame that differs does not change a label, several in a row do."""
    predictor = Predictor(tiny_model(), tiny_model().protocol)
    dark, bright = (np.full((32, 64, 3), value, np.uint8) for value in (20, 230))
    first, other = (predictor.results([image])[0] for image in (dark, bright))
    assert (first != other).any()
    smoothing = Smoothing(0.5)

    def label(image: np.ndarray) -> torch.Tensor:
        # The tiny network's logits differ by hundreds; those of a trained one do not.
        return predictor.results([image], adjust=lambda logits: smoothing(logits / 50))[0]

    for _ in range(20):
        label(dark)
    once = label(bright)
    for _ in range(60):
        last = label(bright)
    assert (once != other).sum() > (last != other).sum()
    assert (last == other).float().mean() > 0.98
