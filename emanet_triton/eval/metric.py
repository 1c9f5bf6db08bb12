"""One integer confusion matrix, as in Cityscapes, and the scores computed from it."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.kernels.resample.op import confusion_counts


def confusion_matrix(
    labels: Tensor, predictions: Tensor, num_classes: int = len(CITYSCAPES.classes)
) -> Tensor:
    """Count the pixels of each pair of label and prediction.

    The matrix of several images is the sum of their matrices.

    Args:
        labels: uint8 train ids of any shape; pixels with ``IGNORE`` are left out.
        predictions: uint8 train ids, same shape and device.
        num_classes: C.

    Returns:
        int64 [C, C] on the same device, rows = label, columns = prediction.

    Raises:
        ValueError: shapes differ, a dtype is not uint8, or a scored pixel's value is no class.
    """
    if labels.shape != predictions.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} differ"
        )
    if labels.dtype != torch.uint8 or predictions.dtype != torch.uint8:
        raise ValueError(f"expected uint8, got {labels.dtype} and {predictions.dtype}")
    return as_matrix(confusion_counts(labels, predictions, num_classes))


def as_matrix(counts: Tensor) -> Tensor:
    """Turn the result of ``confusion_counts``, int64 [C * C + 1], into a matrix, int64 [C, C].

    Raises:
        ValueError: a scored pixel's label or prediction is no class.
    """
    num_classes = math.isqrt(len(counts))
    if strays := int(counts[-1]):
        raise ValueError(
            f"a label or a prediction of {strays} pixels is none of the {num_classes} classes"
        )
    return counts[:-1].view(num_classes, num_classes)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores in percent, float64, unrounded (mmseg ``mIoU`` metric).

    Attributes:
        iou: [C], intersection over union; NaN for a class in neither labels nor predictions, and
            for a class that is not scored.
        acc: [C], the share of a class's pixels that were found; NaN for a class not in labels, and
            for a class that is not scored.
        miou: mean of ``iou`` without the NaN.
        macc: mean of ``acc`` without the NaN.
        aacc: the share of all scored pixels that are right; NaN without any.
    """

    iou: np.ndarray
    acc: np.ndarray
    miou: float
    macc: float
    aacc: float


def scores(confusion: Tensor, unscored: int | None = None) -> Scores:
    """The scores of a confusion matrix.

    Args:
        confusion: int64 [C, C], rows = label.
        unscored: a class whose labelled pixels do not count (``Dataset.unscored``).
    """
    counts = confusion.cpu().numpy()
    if unscored is not None:
        counts = counts.copy()
        counts[unscored] = 0
    hits, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = _ratio(hits, labelled + predicted - hits)
    if unscored is not None:
        iou[unscored] = np.nan  # it may be predicted where another class is labelled
    acc = _ratio(hits, labelled)
    aacc = _ratio(hits.sum(), labelled.sum())
    # The factor 100 comes last, so that ratios and means are equal to mmseg's to the last bit.
    return Scores(100 * iou, 100 * acc, 100 * _mean(iou), 100 * _mean(acc), 100 * float(aacc))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole != 0)


def _mean(values: np.ndarray) -> float:
    """The mean of the values that are not NaN; NaN if all are."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))
