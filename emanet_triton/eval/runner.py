"""One evaluation: every image of a split through the network, into confusion matrices."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from emanet_triton.data.dataset import Dataset, Sample, problems_error
from emanet_triton.eval.finite import finite_matrices
from emanet_triton.eval.metric import scores
from emanet_triton.eval.outputs import Outputs
from emanet_triton.eval.partial import Earlier, PartialResult, Stamp, stamp
from emanet_triton.eval.ranks import Ranks
from emanet_triton.heap import LARGE, give_back
from emanet_triton.inference.inputs import to_device
from emanet_triton.inference.predictor import Predictor
from emanet_triton.kernels.resample.op import confusion_counts
from emanet_triton.progress import Bar
from emanet_triton.workers import Workers


def check_samples(
    samples: list[Sample], dataset: Dataset, problems: list[str], ranks: Ranks, workers: int
) -> None:
    """Check the files of all samples; ranks and threads share the work.

    Args:
        samples: the samples to check.
        dataset: their data set.
        problems: problems with other files of the data set, as ``Dataset.find`` returns them.
        ranks: the processes that share the work.
        workers: number of threads of this process.

    Raises:
        InputError: on every rank, with all problems of the data set.
    """
    mine = samples[ranks.rank :: ranks.count]
    found: list[str] = []
    with (
        Workers(workers) as pool,
        Bar(desc="checking files", total=len(mine), leave=False, disable=not ranks.first) as bar,
    ):
        for wrong in pool.map(dataset.check, mine, ahead=2 * workers):
            ranks.require_others()
            found += wrong
            bar.update()
            ranks.progress(f"{bar.n} of {len(mine)} files checked")
    damaged = [problem for part in ranks.gather(found) for problem in part]
    if everything := problems + sorted(damaged):
        number = f"{len(everything)} problem{'s' * (len(everything) > 1)}"
        raise problems_error(f"{number} in the data set:", everything)


@dataclass(frozen=True)
class Result:
    """The result of a whole split.

    Attributes:
        counts: int64 [M, C, C]: the confusion matrix. If two networks are compared, two more
            follow: the other network's, and the matrix of the two networks' predictions (row =
            prediction of the first).
        seconds: the seconds that all runs took.
        waiting: seconds for which this process waited, in this run, for files to be decoded.
    """

    counts: Tensor
    seconds: float
    waiting: float


class _Started(NamedTuple):
    """A batch on its way.

    Attributes:
        batch: its samples.
        counts: results of ``confusion_counts`` that the device may still be computing.
        predictors: for each result in ``counts`` its predictor, see ``finite_matrices``.
        pictures: the pictures that threads may still be writing.
    """

    batch: list[Sample]
    counts: list[Tensor]
    predictors: list[Predictor]
    pictures: list[Future]


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
    other: Predictor | None = None,
) -> Result:
    """Evaluate the samples. The ranks share batches that do not depend on the number of ranks.

    The results of finished images are kept on disk, whatever happens next, and ``resume`` uses
    them. Decoding, the network and the writing of pictures overlap.

    Args:
        predictor: predicts the labels of images.
        samples: images and labels, already checked.
        partial: counts and keeps the finished images; the caller discards it.
        outputs: the pictures to write, and the data set.
        ranks: the processes that share the samples.
        workers: threads that decode images ahead of the network and write pictures after it.
        resume: go on where an interrupted run with the same settings stopped.
        say: prints a line for the user.
        other: another predictor, to compare with on the same images.

    Returns:
        The sum over all ranks, on every rank.

    Raises:
        InputError: a file has changed since it was checked, a picture cannot be written, the
            logits are not finite, memory does not suffice, or another rank has failed.
    """
    begun = time.monotonic()
    earlier = _taken_over(partial, samples, outputs, ranks, resume, say)
    mine = _batches_left(samples, earlier.names, predictor.images_at_once, ranks)
    total = sum(map(len, mine))
    waiting = 0.0
    started: deque[_Started] = deque()
    on_cpu = predictor.device.type == "cpu"
    most_started = workers if outputs else 0 if on_cpu else 1
    with (
        Workers(workers) as pool,
        Bar(total=total, unit="image", miniters=1, disable=not ranks.first) as bar,
    ):

        def finish() -> None:
            batch, counts, predictors, pictures = started.popleft()
            names = [sample.name for sample in batch]
            matrices = finite_matrices(counts, names, predictors)
            for picture in pictures:
                picture.result()
            drawn = [stamp(*outputs.pictures(sample)) for sample in batch]
            partial.add(names, matrices, time.monotonic() - begun, drawn)
            shown = scores(earlier.counts[0] + partial.counts[0], dataset.unscored).miou
            bar.set_postfix_str(f"mIoU {shown:.2f}", refresh=False)
            bar.update(len(batch))
            ranks.progress(f"{len(partial.names)} of {total} images")

        dataset = outputs.dataset
        decoded = pool.map(
            lambda batch: [dataset.read(sample) for sample in batch],
            mine,
            ahead=workers if on_cpu else 2 * workers,
        )
        try:
            for batch in mine:
                ranks.require_others()
                asked = time.monotonic()
                loaded = next(decoded)
                waiting += time.monotonic() - asked
                if on_cpu and loaded[0][1].size >= LARGE:
                    give_back()
                started.append(_start(predictor, other, batch, loaded, outputs, pool))
                while len(started) > most_started:
                    finish()
        finally:  # also after an error, so that no finished work is lost
            decoded.close()
            try:
                while started:
                    finish()
            finally:
                if partial.names:
                    partial.write()
                if left := total - len(partial.names):
                    say(_what_is_kept(left, len(samples), ranks))
    counts = earlier.counts + ranks.sum(partial.counts)
    return Result(counts, earlier.seconds + time.monotonic() - begun, waiting)


def _taken_over(
    partial: PartialResult,
    samples: list[Sample],
    outputs: Outputs,
    ranks: Ranks,
    resume: bool,
    say: Callable[[str], None],
) -> Earlier:
    """The images that earlier runs have finished. Without ``resume`` all of them are dropped."""
    by_name = {sample.name: sample for sample in samples}

    def drawn(name: str) -> Stamp:
        return stamp(*outputs.pictures(by_name[name]))

    earlier = partial.earlier(ranks, drawn if resume else None)
    if ranks.first:
        partial.discard_forgotten()
    if resume:
        say(f"resuming: {len(earlier.names)} of {len(samples)} images were finished before")
        if partial.left_out:
            say(f"note: not taken over: {partial.left_out}")
        return earlier
    if earlier.names:
        say(
            f"starting anew: {len(earlier.names)} images finished by an interrupted run are dropped"
        )
    partial.discard()
    ranks.barrier()  # no rank writes before all ranks have removed
    return Earlier(set(), torch.zeros_like(earlier.counts), 0.0)


def _what_is_kept(left: int, images: int, ranks: Ranks) -> str:
    """A line for the user after this rank has ended with ``left`` of its images unfinished."""
    one = ranks.count == 1
    kept = f"{images - left} of {images} images are finished" if one else "finished images are kept"
    return f"{kept}; --resume goes on from there"


def _batches_left(
    samples: list[Sample], done: set[str], size: int, ranks: Ranks
) -> list[list[Sample]]:
    """This rank's batches without finished images; no number of ranks changes the batches."""
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    left = ([s for s in b if s.name not in done] for b in batches[ranks.rank :: ranks.count])
    return [batch for batch in left if batch]


def _start(
    predictor: Predictor,
    other: Predictor | None,
    batch: list[Sample],
    loaded: list[tuple[np.ndarray, np.ndarray]],
    outputs: Outputs,
    pool: Workers,
) -> _Started:
    """Send a batch on its way. A GPU still works on it when this function returns."""
    images, targets = zip(*loaded, strict=True)
    predicted = list(predictor(images))
    targets_on_device = [
        to_device(torch.from_numpy(labels), its.device)
        for labels, its in zip(targets, predicted, strict=True)
    ]
    predictors, compared = [predictor], [(targets_on_device, predicted)]
    if other is not None:
        others = list(other(images))
        predictors += [other, other]
        compared += [(targets_on_device, others), (predicted, others)]
    classes = len(outputs.dataset.classes)
    counts = [
        torch.stack(
            [
                confusion_counts(row.to(column.device), column, classes).to(predictor.device)
                for row, column in zip(rows, columns, strict=True)
            ]
        ).sum(0)
        for rows, columns in compared
    ]
    pictures = []
    if outputs:
        arguments = batch, images, targets, predicted
        pictures = [pool.submit(outputs.save, *each) for each in zip(*arguments, strict=True)]
    return _Started(batch, counts, predictors, pictures)
