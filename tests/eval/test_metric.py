import math
from pathlib import Path
from types import SimpleNamespace

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import (
    evaluatePair,
    generateMatrix,
    getIouScoreForLabel,
    getScoreAverage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from emanet_triton.data.cityscapes import CLASSES, to_label_ids
from emanet_triton.data.dataset import IGNORE
from emanet_triton.data.png import write_png
from emanet_triton.eval.metric import confusion_matrix, scores

GOLDEN = Path(__file__).parents[1] / "golden" / "metric.npz"
TRAIN_IDS = [*range(19), IGNORE]
CASES = {
    "all classes": (TRAIN_IDS, range(19)),
    "few classes": ([0, 3, 18, IGNORE], [0, 3, 7]),
    "nothing right": ([1, 2], [3, 4]),
    "nothing ignored": ([0, 1], [0, 1]),
}


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@st.composite
def pairs(draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and predictions with the same shape."""
    shape = draw(npst.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12))
    return (
        torch.from_numpy(draw(npst.arrays(np.uint8, shape, elements=st.sampled_from(TRAIN_IDS)))),
        torch.from_numpy(draw(npst.arrays(np.uint8, shape, elements=st.integers(0, 18)))),
    )


def test_golden_exactly():
    golden = np.load(GOLDEN)
    confusion = confusion_matrix(*tensors(golden["gt"], golden["pred"]))
    result = scores(confusion)
    assert np.isnan(result.iou).sum() == 1
    np.testing.assert_array_equal(result.iou, 100 * golden["IoU"])
    np.testing.assert_array_equal(result.acc, 100 * golden["Acc"])
    assert result.miou == 100 * golden["mIoU"]
    assert result.macc == 100 * golden["mAcc"]
    assert result.aacc == 100 * golden["aAcc"]


@pytest.mark.parametrize(("present", "predicted"), CASES.values(), ids=CASES.keys())
def test_cityscapesscripts_gives_the_same_class_scores(tmp_path, present, predicted):
    rng = np.random.RandomState(0)
    args = SimpleNamespace(evalInstLevelScore=False, evalPixelAccuracy=False, evalLabels=[])
    official_matrix = generateMatrix(args)
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    for _ in range(2):
        labels = rng.choice([*present], (30, 50)).astype(np.uint8)
        predictions = rng.choice([*predicted], (30, 50)).astype(np.uint8)
        right = rng.rand(30, 50) < 0.6
        if set(predicted) & set(present):
            predictions = np.where(right & np.isin(labels, [*predicted]), labels, predictions)
        confusion += confusion_matrix(*tensors(labels, predictions))
        files = tmp_path / "prediction.png", tmp_path / "labelIds.png"
        for file, train_ids in zip(files, (predictions, labels), strict=True):
            write_png(file, to_label_ids(train_ids))
        evaluatePair(*map(str, files), official_matrix, {}, {}, args)

    ids = [c.label_id for c in CLASSES]
    np.testing.assert_array_equal(confusion.numpy(), official_matrix[np.ix_(ids, ids)])
    class_scores = {c.name: getIouScoreForLabel(c.label_id, official_matrix, args) for c in CLASSES}
    result = scores(confusion)
    np.testing.assert_array_equal(result.iou, [100 * score for score in class_scores.values()])
    # The mean comes from NumPy, as in mmseg; cityscapesScripts adds in another order.
    mean = getScoreAverage(class_scores, args)
    assert math.isclose(result.miou, 100 * mean, rel_tol=1e-14)


@settings(deadline=None)  # a busy machine must not fail the test
@given(pairs())
def test_sum_is_the_number_of_scored_pixels(pair):
    labels, predictions = pair
    confusion = confusion_matrix(labels, predictions)
    assert confusion.dtype == torch.int64
    assert confusion.shape == (19, 19)
    assert confusion.sum() == (labels != IGNORE).sum()
    for row in range(19):
        assert confusion[row].sum() == (labels == row).sum()


@settings(deadline=None)  # a busy machine must not fail the test
@given(pairs(), st.data())
def test_matrices_of_parts_add_up(pair, data):
    labels, predictions = (tensor.flatten() for tensor in pair)
    cut = data.draw(st.integers(0, labels.numel()))
    parts = [
        confusion_matrix(labels[part], predictions[part]) for part in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(parts[0] + parts[1], confusion_matrix(labels, predictions))


@settings(deadline=None)  # a busy machine must not fail the test
@given(pairs(), st.permutations(range(19)))
def test_renaming_classes_permutes_the_matrix_and_the_scores(pair, order):
    table = torch.full((256,), IGNORE, dtype=torch.uint8)
    table[:19] = torch.tensor(order, dtype=torch.uint8)
    confusion = confusion_matrix(*pair)
    renamed = confusion_matrix(*(table[tensor.long()] for tensor in pair))
    assert torch.equal(renamed[order][:, order], confusion)
    np.testing.assert_array_equal(scores(renamed).iou[order], scores(confusion).iou)
    assert scores(renamed).aacc == pytest.approx(scores(confusion).aacc, rel=0, abs=0, nan_ok=True)


@settings(deadline=None)  # a busy machine must not fail the test
@given(pairs())
def test_perfect_prediction_scores_100(pair):
    labels, _ = pair
    result = scores(confusion_matrix(labels, labels.where(labels != IGNORE, 0)))
    present = [bool((labels == i).any()) for i in range(19)]
    expected = np.where(present, 100.0, np.nan)
    np.testing.assert_array_equal(result.iou, expected)
    np.testing.assert_array_equal(result.acc, expected)
    means = [result.miou, result.macc, result.aacc]
    np.testing.assert_array_equal(means, [100.0 if any(present) else np.nan] * 3)


def test_by_hand():
    labels = torch.tensor([[0, 0, 0, 1], [1, 2, IGNORE, IGNORE]], dtype=torch.uint8)
    predictions = torch.tensor([[0, 0, 1, 1], [1, 3, 4, 0]], dtype=torch.uint8)
    confusion = confusion_matrix(labels, predictions, num_classes=5)
    expected = torch.zeros(5, 5, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[2, 3] = 2, 1, 2, 1
    assert torch.equal(confusion, expected)
    result = scores(confusion)
    # Class 3 occurs only in the predictions; class 4 is predicted only at ignored pixels.
    np.testing.assert_array_equal(result.iou, [100 * (2 / 3), 100 * (2 / 3), 0, 0, np.nan])
    np.testing.assert_array_equal(result.acc, [100 * (2 / 3), 100, 0, np.nan, np.nan])
    assert result.miou == pytest.approx(100 / 3)
    assert result.macc == pytest.approx(500 / 9)
    assert result.aacc == pytest.approx(200 / 3)


@pytest.mark.filterwarnings("error")
def test_nothing_to_score_is_nan_without_a_warning():
    ignored = torch.full((4, 4), IGNORE, dtype=torch.uint8)
    result = scores(confusion_matrix(ignored, torch.zeros_like(ignored)))
    assert np.isnan([*result.iou, *result.acc, result.miou, result.macc, result.aacc]).all()


def test_counts_beyond_32_bits_stay_exact():
    confusion = torch.zeros(19, 19, dtype=torch.int64)
    confusion[0, 0], confusion[0, 1] = 2**40, 2**40 + 2
    assert scores(confusion).iou[0] == 100 * (2**40 / (2**41 + 2))


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        (torch.zeros(2, 3).byte(), torch.zeros(3, 2).byte(), r"labels \(2, 3\) and predictions"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).byte(), r"expected uint8, got torch.int64"),
        (torch.full((2,), 19).byte(), torch.zeros(2).byte(), "none of the 19 classes"),
        (torch.zeros(2).byte(), torch.full((2,), 19).byte(), "none of the 19 classes"),
        (torch.zeros(2).byte(), torch.full((2,), 255).byte(), "none of the 19 classes"),
    ],
    ids=["shapes", "dtype", "label", "prediction", "ignored prediction"],
)
def test_what_cannot_be_counted(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, predictions)


def test_an_unscored_pixel_may_hold_any_prediction():
    labels = torch.tensor([IGNORE, 3], dtype=torch.uint8)
    assert confusion_matrix(labels, torch.tensor([200, 3], dtype=torch.uint8)).sum() == 1


def test_a_class_that_is_not_scored():
    """As ``bdd100k.eval.seg`` scores drivable areas, whose last class is the background."""
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 3, (2, 40, 50))
    hits = label == predicted
    counted = label != 2
    iou = [
        (hits & (label == c)).sum() / (counted & ((label == c) | (predicted == c))).sum()
        for c in (0, 1)
    ]
    confusion = torch.tensor(np.bincount(3 * label.ravel() + predicted.ravel()).reshape(3, 3))
    result = scores(confusion, unscored=2)
    np.testing.assert_allclose(result.iou, [100 * iou[0], 100 * iou[1], np.nan], rtol=1e-12)
    assert result.miou == pytest.approx(50 * sum(iou), rel=1e-12)
    assert result.aacc == pytest.approx(100 * hits[counted].mean(), rel=1e-12)
    assert np.isnan(result.acc[2])
    assert scores(confusion).miou != result.miou
