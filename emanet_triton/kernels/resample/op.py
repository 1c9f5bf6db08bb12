"""Make labels from low-resolution logits of any number of views, without full-size logits.

Resizing, placing windows, dividing by the number of windows over a pixel, and mirroring act on rows
and on columns separately. So a view's logit at a pixel is a weighted sum of few low-resolution
logits, its *taps*: some rows times some columns. The logits of all views and windows of an image
lie end to end along one axis of P positions, in any order in which a tap's position is an offset of
its row plus an offset of its column.
"""

import contextlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from emanet_triton.kernels.checks import (
    BACKENDS,
    check_choice,
    check_device,
    check_float,
    check_layout,
)
from emanet_triton.kernels.device import auto_backend, triton_kernels
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.resample import eager
from emanet_triton.kernels.resample.eager import IGNORE

AVERAGES = ("probabilities", "logits")


class Taps(NamedTuple):
    """The taps of every output along one axis, for each view.

    Attributes:
        index: int32 [V, T, n]: V views, T taps, n outputs. The offset of a row plus the offset of
            a column is a position, from 0 to P - 1. A GPU does not check this.
        weight: float32 [V, T, n], not negative; 0 where an output has fewer than T taps.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    weight: Tensor


def resample_labels(
    logits: Tensor,
    rows: Taps,
    columns: Taps,
    *,
    average: str = "probabilities",
    backend: str = "auto",
) -> Tensor:
    """Label every pixel with the class of the largest mean over the views.

    With a single view this is the class of the largest logit. The largest probability is the same
    but for rounding.

    Args:
        logits: finite, [B, C, P]; C up to 255; float32, float16 or bfloat16.
        rows: taps of the H output rows, V views.
        columns: taps of the W output columns, V views.
        average: the mean is that of the views' ``"probabilities"``, or of their ``"logits"``.
        backend: ``"triton"`` runs on a GPU and in Triton's interpreter; ``"torch"`` runs anywhere;
            ``"auto"`` is ``"triton"`` where it runs on a GPU.

    Returns:
        uint8 [B, H, W]; of classes with equal means the first.

    Raises:
        ValueError: an argument is not as above.
    """
    backend = _check(logits, rows, columns, average, backend)
    return torch.ops.emanet_triton.resample_labels(logits, *rows, *columns, average, backend)


def resample_probabilities(
    logits: Tensor,
    rows: Taps,
    columns: Taps,
    *,
    average: str = "probabilities",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Class probabilities of every pixel; arguments as in ``resample_labels``.

    Returns:
        The labels, uint8 [B, H, W], and the probabilities, float32 [B, C, H, W]. The probabilities
        are the mean over the views, and the labels the first class of the largest. With
        ``average="logits"`` the probabilities are the softmax of the mean logits, and the labels
        those of ``resample_labels``.

    Raises:
        ValueError: as ``resample_labels``.
    """
    backend = _check(logits, rows, columns, average, backend)
    return torch.ops.emanet_triton.resample_probabilities(logits, *rows, *columns, average, backend)


def confusion_counts(
    targets: Tensor, labels: Tensor, num_classes: int, *, backend: str = "auto"
) -> Tensor:
    """Count the pixels of each (target, label) pair, without waiting for the device.

    Args:
        targets: uint8, any shape; 255 is left out.
        labels: uint8, same shape and device.
        num_classes: C, up to 255.
        backend: as in ``resample_labels``.

    Returns:
        int64 [C * C + 1]: the counts of the pairs, a row per target; last, how many pixels have a
        target or a label that is no class: 0 for a sound data set. All counts are exact.

    Raises:
        ValueError: an argument is not as above.
    """
    for name, tensor in (("targets", targets), ("labels", labels)):
        if tensor.dtype != torch.uint8 or tensor.shape != labels.shape:
            wanted = f"uint8 {list(labels.shape)}"
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype} {list(tensor.shape)}")
    check_device("targets", targets, "labels", labels)
    backend = _check_backend(backend, num_classes, labels)
    return torch.ops.emanet_triton.confusion_counts(targets, labels, num_classes, backend)


def _check(logits: Tensor, rows: Taps, columns: Taps, average: str, backend: str) -> str:
    """Refuse bad arguments; return the backend to run."""
    check_choice("average", average, AVERAGES)
    check_layout("logits", logits, "B, C, P")
    check_float("logits", logits.dtype)
    classes = logits.shape[1]
    for name, taps in (("rows", rows), ("columns", columns)):
        if taps.index.dim() != 3 or taps.index.numel() == 0:
            shape = list(taps.index.shape)
            raise ValueError(f"{name}.index must be [V, T, n] and not empty, got {shape}")
        if taps.weight.shape != taps.index.shape:
            shapes = f"{list(taps.index.shape)} and {list(taps.weight.shape)}"
            raise ValueError(f"{name}.index and {name}.weight must have one shape, got {shapes}")
        if taps.index.dtype != torch.int32 or taps.weight.dtype != torch.float32:
            dtypes = f"{taps.index.dtype} and {taps.weight.dtype}"
            raise ValueError(f"{name} must be int32 and float32, got {dtypes}")
        check_device(f"{name}.index", taps.index, "logits", logits)
        check_device(f"{name}.weight", taps.weight, "logits", logits)
    if len(rows.index) != len(columns.index):
        counts = f"{len(rows.index)} and {len(columns.index)}"
        raise ValueError(f"rows and columns must have one number of views, got {counts}")
    return _check_backend(backend, classes, logits)


def _check_backend(backend: str, classes: int, tensor: Tensor) -> str:
    if classes > IGNORE:
        raise ValueError(f"there must be at most {IGNORE} classes, got {classes}")
    check_choice("backend", backend, BACKENDS)
    return auto_backend(tensor.is_cuda) if backend == "auto" else backend


def _kernels(backend: str, tensor: Tensor) -> contextlib.AbstractContextManager[ModuleType]:
    """The module of the backend, with the tensor's device current."""
    if backend == "torch":
        return contextlib.nullcontext(eager)
    return triton_kernels("resample.gather", tensor)


def _run_labels(
    logits: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    column_index: Tensor,
    column_weight: Tensor,
    average: str,
    backend: str,
) -> Tensor:
    tables = row_index, row_weight, column_index, column_weight
    with _kernels(backend, logits) as kernels:
        return kernels.resample(logits, tables, average=average, probabilities=False)[0]


def _run_probabilities(
    logits: Tensor,
    row_index: Tensor,
    row_weight: Tensor,
    column_index: Tensor,
    column_weight: Tensor,
    average: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tables = row_index, row_weight, column_index, column_weight
    with _kernels(backend, logits) as kernels:
        return kernels.resample(logits, tables, average=average, probabilities=True)


def _run_counts(targets: Tensor, labels: Tensor, num_classes: int, backend: str) -> Tensor:
    with _kernels(backend, labels) as kernels:
        return kernels.confusion(targets, labels, num_classes)


def _fake_labels(logits: Tensor, rows: Tensor, _row_weight, columns: Tensor, *_) -> Tensor:
    shape = logits.shape[0], rows.shape[2], columns.shape[2]
    return torch.empty(shape, dtype=torch.uint8, device=logits.device)


def _fake_probabilities(logits: Tensor, *tables_and_more) -> tuple[Tensor, Tensor]:
    labels = _fake_labels(logits, *tables_and_more)
    B, H, W = labels.shape
    shape = B, logits.shape[1], H, W
    return labels, torch.empty(shape, dtype=torch.float32, device=logits.device)


def _fake_counts(targets: Tensor, labels: Tensor, num_classes: int, backend: str) -> Tensor:
    return torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=labels.device)


register(
    __name__,
    Operator("resample_labels", _run_labels, _fake_labels),
    Operator("resample_probabilities", _run_probabilities, _fake_probabilities),
    Operator("confusion_counts", _run_counts, _fake_counts),
)
