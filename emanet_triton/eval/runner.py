"""One evaluation: every image of a split through the network, into one confusion matrix."""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emanet_triton.errors import InputError
from emanet_triton.eval.cityscapes import (
    CLASSES,
    Sample,
    check_sample,
    prediction_name,
    problems_error,
    read_labels,
    to_label_ids,
)
from emanet_triton.eval.draw import overlay
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.metric import confusion_matrix, scores
from emanet_triton.eval.partial import PartialResult
from emanet_triton.eval.png import read_image, write_png
from emanet_triton.eval.ranks import Ranks


@dataclass(frozen=True)
class Outputs:
    """Folders for what an evaluation draws; ``None`` for nothing.

    Attributes:
        predictions: label ids under the benchmark server's names.
        overlays: image, prediction, label and error side by side.
    """

    predictions: Path | None = None
    overlays: Path | None = None

    def prepare(self) -> None:
        """Make the folders and see that they can be written, before anything is computed.

        Raises:
            InputError: a folder that cannot be made or written.
        """
        for folder in filter(None, (self.predictions, self.overlays)):
            require_writable(folder / "x")

    def save(self, sample: Sample, image: np.ndarray, labels: np.ndarray, pred: np.ndarray) -> None:
        """Write what was asked for; all arrays are uint8, labels and ``pred`` train ids."""
        name = prediction_name(sample)
        if self.predictions:
            write_png(self.predictions / name, to_label_ids(pred))
        if self.overlays:
            write_png(self.overlays / name, overlay(image, pred, labels))


def require_writable(file: Path) -> None:
    """Make the folder of ``file`` and see that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # a name of its own for every rank
            pass
    except OSError as error:
        raise InputError(
            f"{file.parent}: expected a folder that can be written ({error.strerror})"
        ) from None
    if file.is_dir():
        raise InputError(f"{file}: expected a file to write, this is a folder")


def check_samples(samples: list[Sample], ranks: Ranks, workers: int) -> None:
    """Check the files of all samples, shared among ranks and threads.

    Raises:
        InputError: on every rank, with all problems of all samples.
    """
    mine = samples[ranks.rank :: ranks.count]
    with ThreadPoolExecutor(workers) as pool:
        checked = tqdm(
            pool.map(check_sample, mine),
            desc="checking files",
            total=len(mine),
            leave=False,
            disable=not ranks.first,
        )
        found = [problem for problems in checked for problem in problems]
    problems = [problem for part in ranks.gather(found) for problem in part]
    if problems:
        raise problems_error(f"{len(problems)} problems in the data set:", sorted(problems))


@dataclass(frozen=True)
class Result:
    """The matrix of a whole split, int64 [19, 19], and the seconds it took."""

    confusion: Tensor
    seconds: float


def evaluate(
    predictor: Predictor,
    samples: list[Sample],
    partial: PartialResult,
    *,
    outputs: Outputs,
    ranks: Ranks,
    workers: int,
    resume: bool,
    say: Callable[[str], None],
) -> Result:
    """Evaluate the samples, shared among the ranks in batches that no number of ranks changes.

    What is finished is kept on disk, whatever happens next, and taken over with ``resume``.

    Args:
        predictor: labels of images.
        samples: images and labels, already checked.
        partial: where the finished images are counted and kept; the caller discards it.
        outputs: what to draw.
        ranks: the processes that share the samples.
        workers: threads that decode images ahead of the network.
        resume: go on where an interrupted run of the same settings stopped.
        say: prints a line for the user.

    Returns:
        The sum over all ranks, on every rank.
    """
    started = time.monotonic()
    done, confusion, seconds = partial.earlier()
    ranks.barrier()  # every rank has read the earlier files before one writes
    if resume:
        say(f"resuming: {len(done)} of {len(samples)} images were finished before")
    elif done:
        say(f"starting anew: {len(done)} images finished by an interrupted run are dropped")
        if ranks.first:
            partial.discard()
        ranks.barrier()
    if not resume:
        done, confusion, seconds = set(), torch.zeros_like(confusion), 0.0

    size = predictor.batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    mine = [
        [s for s in batch if s.name not in done] for batch in batches[ranks.rank :: ranks.count]
    ]
    mine = [batch for batch in mine if batch]
    total = confusion.clone()  # what the progress bar shows: the earlier part and this rank's
    try:
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=sum(map(len, mine)), unit="image", disable=not ranks.first) as bar,
        ):
            for batch, loaded in zip(mine, _ahead(pool, _load, mine, 2 * workers), strict=True):
                counted = _evaluate_batch(predictor, batch, loaded, outputs)
                partial.add([s.name for s in batch], counted, time.monotonic() - started)
                total += counted
                bar.set_postfix_str(f"mIoU {scores(total).miou:.2f}", refresh=False)
                bar.update(len(batch))
    finally:  # also when the rest fails: nothing already computed is lost
        if partial.names:
            partial.write()
        if (finished := len(done) + len(partial.names)) < len(samples) and ranks.count == 1:
            say(f"{finished} of {len(samples)} images are finished; --resume goes on from there")
    confusion = confusion + ranks.sum(partial.confusion)
    return Result(confusion, seconds + time.monotonic() - started)


def _evaluate_batch(
    predictor: Predictor,
    batch: list[Sample],
    loaded: list[tuple[np.ndarray, np.ndarray]],
    outputs: Outputs,
) -> Tensor:
    """The confusion matrix of a batch, int64 [19, 19] on the CPU."""
    counted = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    predictions = predictor([image for image, _ in loaded])
    for sample, (image, labels), predicted in zip(batch, loaded, predictions, strict=True):
        on_device = torch.from_numpy(labels).to(predicted.device)
        counted += confusion_matrix(on_device, predicted).cpu()
        outputs.save(sample, image, labels, predicted.cpu().numpy())
    return counted


def _load(batch: list[Sample]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image, uint8 RGB [H, W, 3], and train ids, uint8 [H, W], of each sample."""
    return [(read_image(sample.image), read_labels(sample)) for sample in batch]


def _ahead(pool: ThreadPoolExecutor, load: Callable, items: Iterable, depth: int) -> Iterator:
    """``map(load, items)`` by the pool, at most ``depth`` results ahead of the reader."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(load, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
