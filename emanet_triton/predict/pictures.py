"""Pictures through the network: reading, the network and writing overlap."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from torch import Tensor

from emanet_triton.data.picture import read_picture
from emanet_triton.errors import InputError, first_line
from emanet_triton.heap import LARGE, give_back
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite
from emanet_triton.predict.outputs import Outputs, Prediction
from emanet_triton.predict.sources import Source
from emanet_triton.workers import Workers


class Read(NamedTuple):
    """A picture that was read, or the reason why it could not be."""

    source: Source
    image: np.ndarray | None
    problem: str | None


def segment_pictures(
    sources: Sequence[Source],
    predictor: Predictor,
    outputs: Outputs,
    workers: int,
    done: Callable[[Source, str | None], None],
) -> None:
    """Segment pictures and write their results.

    Args:
        sources: the pictures. Those of one size that follow each other go through the network
            together, as many as the predictor's batch size allows.
        predictor: the network.
        outputs: what is saved, and where.
        workers: threads that read and write.
        done: is called for each picture, after its results are written, with what is wrong with
            it or ``None``.

    Raises:
        InputError: a result cannot be written. The pictures before it are complete.
    """
    writing: deque[tuple[Source, Future]] = deque()

    def finish() -> None:
        source, written = writing.popleft()
        done(source, written.result())

    with Workers(workers) as pool:
        read = pool.map(_read, sources, ahead=workers + predictor.images_at_once)
        try:
            for batch in _batches(read, predictor.images_at_once):
                for each, labels, probabilities in _segmented(batch, predictor, outputs, done):
                    job = pool.submit(_write, outputs, each, labels, probabilities)
                    writing.append((each.source, job))
                    while len(writing) > workers:
                        finish()
        finally:  # also after an error, so that no finished work is lost
            read.close()
            while writing:
                finish()


def _read(source: Source) -> Read:
    assert isinstance(source.path, Path)
    try:
        return Read(source, read_picture(source.path), None)
    except InputError as error:
        return Read(source, None, str(error))


def _batches(read: Iterable[Read], most: int) -> Iterator[list[Read]]:
    """Yield pictures of one size that follow each other, and unreadable ones alone."""
    batch: list[Read] = []
    for each in read:
        if batch and (len(batch) == most or _shape(batch[0]) != _shape(each)):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


def _shape(read: Read) -> tuple[int, ...] | None:
    return None if read.image is None else read.image.shape


def _segmented(
    batch: list[Read],
    predictor: Predictor,
    outputs: Outputs,
    done: Callable[[Source, str | None], None],
) -> Iterator[tuple[Read, Tensor, Tensor | None]]:
    """Yield the labels, and the probabilities if they are saved, of the pictures of a batch."""
    while batch:
        images = [each.image for each in batch if each.image is not None]
        if not images:
            for each in batch:
                done(each.source, each.problem)
            return
        if predictor.device.type == "cpu" and images[0].size >= LARGE:
            give_back()
        try:
            labels, *rest = predict(predictor, images, outputs)
        except InputError as error:  # even one picture needs too much memory
            done(batch[0].source, f"{batch[0].source}: {error}")
            batch = batch[1:]
            continue
        probabilities = rest[0] if rest else [None] * len(labels)
        yield from zip(batch[: len(labels)], labels, probabilities, strict=True)
        batch = batch[len(labels) :]


def predict(
    predictor: Predictor,
    images: Sequence[np.ndarray],
    outputs: Outputs,
    adjust: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Labels, and probabilities if they are saved; see ``Predictor.results``.

    The labels are those of an evaluation, also beside probabilities.
    """
    wanted = "probabilities" in outputs.kinds
    return predictor.results(images, probabilities=wanted, same_labels=True, adjust=adjust)


def as_prediction(
    image: np.ndarray, labels: Tensor, probabilities: Tensor | None
) -> Prediction | None:
    """The prediction on the CPU, or ``None`` if the logits were not finite."""
    labels = labels.cpu()
    if not are_finite(labels):
        return None
    rest = None if probabilities is None else probabilities.cpu().numpy()
    return Prediction(image, labels.numpy(), rest)


def _write(
    outputs: Outputs, read: Read, labels: Tensor, probabilities: Tensor | None
) -> str | None:
    """Write the results of a picture; return what is wrong with it instead, if anything is.

    Raises:
        InputError: a file cannot be written.
    """
    assert read.image is not None
    prediction = as_prediction(read.image, labels, probabilities)
    if prediction is None:
        return f"{read.source}: {NOT_FINITE_MESSAGE}"
    try:
        outputs.save(read.source, prediction)
    except (MemoryError, cv2.error) as error:  # an odd shape, such as a line of pixels
        return f"{read.source}: its results cannot be drawn ({first_line(error)})"
    return None
