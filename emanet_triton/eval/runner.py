"""One evaluation: every image of a split through the network, into confusion matrices."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from emanet_triton.eval.cityscapes import (
    CLASSES,
    Sample,
    check_sample,
    problems_error,
    read_labels,
)
from emanet_triton.eval.finite import matrices_of
from emanet_triton.eval.heap import give_back
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.inputs import to_device
from emanet_triton.eval.metric import scores
from emanet_triton.eval.outputs import Outputs
from emanet_triton.eval.partial import PartialResult
from emanet_triton.eval.png import read_image
from emanet_triton.eval.ranks import Ranks
from emanet_triton.kernels.resample import confusion_counts

LARGE = 2**20  # pixels of an image: below, returning memory takes more than it is worth


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
    """What a whole split came to.

    Attributes:
        counts: int64 [M, 19, 19]: the confusion matrix; and where two networks are compared the
            other's, and that of the labels of the two (row = this network's).
        seconds: it took.
        waiting: of this run's seconds, how many this process waited for files to be decoded.
    """

    counts: Tensor
    seconds: float
    waiting: float


class _Started(NamedTuple):
    """A batch on its way: what the device still counts, and the pictures being written."""

    batch: list[Sample]
    counts: list[Tensor]
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
    """Evaluate the samples, shared among the ranks in batches that no number of ranks changes.

    What is finished is kept on disk, whatever happens next, and taken over with ``resume``.
    Decoding, the network and the writing of pictures overlap.

    Args:
        predictor: labels of images.
        samples: images and labels, already checked.
        partial: where the finished images are counted and kept; the caller discards it.
        outputs: what to draw.
        ranks: the processes that share the samples.
        workers: threads that decode images ahead of the network and write pictures after it.
        resume: go on where an interrupted run of the same settings stopped.
        say: prints a line for the user.
        other: a predictor to compare with, on the same images.

    Returns:
        The sum over all ranks, on every rank.
    """
    begun = time.monotonic()
    done, earlier, seconds = partial.earlier()
    ranks.barrier()  # every rank has read the earlier files before one writes
    if resume:
        say(f"resuming: {len(done)} of {len(samples)} images were finished before")
    elif done:
        say(f"starting anew: {len(done)} images finished by an interrupted run are dropped")
        if ranks.first:
            partial.discard()
        ranks.barrier()
    if not resume:
        done, earlier, seconds = set(), torch.zeros_like(earlier), 0.0

    mine = _batches_left(samples, done, predictor.images_at_once, ranks)
    waiting = 0.0
    started: deque[_Started] = deque()
    on_cpu = predictor.device.type == "cpu"
    most_started = workers if outputs else 0 if on_cpu else 1
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=sum(map(len, mine)), unit="image", disable=not ranks.first) as bar,
    ):

        def finish() -> None:
            batch, counts, pictures = started.popleft()
            matrices = matrices_of(counts, [s.name for s in batch], predictor)
            for picture in pictures:
                picture.result()
            partial.add([s.name for s in batch], matrices, time.monotonic() - begun)
            shown = scores(earlier[0] + partial.counts[0]).miou
            bar.set_postfix_str(f"mIoU {shown:.2f}", refresh=False)
            bar.update(len(batch))

        try:
            decoded = _ahead(pool, _load, mine, workers if on_cpu else 2 * workers)
            for batch in mine:
                asked = time.monotonic()
                loaded = next(decoded)
                waiting += time.monotonic() - asked
                if on_cpu and loaded[0][1].size >= LARGE:
                    give_back()
                started.append(_start(predictor, other, batch, loaded, outputs, pool))
                while len(started) > most_started:
                    finish()
        finally:  # also when the rest fails: nothing already computed is lost
            decoded.close()
            try:
                while started:
                    finish()
            finally:
                if partial.names:
                    partial.write()
                finished = len(done) + len(partial.names)
                if finished < len(samples) and ranks.count == 1:
                    say(
                        f"{finished} of {len(samples)} images are finished; "
                        "--resume goes on from there"
                    )
    counts = earlier + ranks.sum(partial.counts)
    return Result(counts, seconds + time.monotonic() - begun, waiting)


def _batches_left(
    samples: list[Sample], done: set[str], size: int, ranks: Ranks
) -> list[list[Sample]]:
    """This rank's batches, without what is done: the same whatever the number of ranks."""
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    left = ([s for s in b if s.name not in done] for b in batches[ranks.rank :: ranks.count])
    return [batch for batch in left if batch]


def _start(
    predictor: Predictor,
    other: Predictor | None,
    batch: list[Sample],
    loaded: list[tuple[np.ndarray, np.ndarray]],
    outputs: Outputs,
    pool: ThreadPoolExecutor,
) -> _Started:
    """Send a batch on its way; a GPU works on it after this returns."""
    images, targets = zip(*loaded, strict=True)
    predicted = list(predictor(images))
    targets_on_device = [to_device(t, p.device) for t, p in zip(targets, predicted, strict=True)]
    compared = [(targets_on_device, predicted)]
    if other is not None:
        others = list(other(images))
        compared += [(targets_on_device, others), (predicted, others)]
    counts = [
        sum(
            confusion_counts(row.to(column.device), column, len(CLASSES))
            for row, column in zip(rows, columns, strict=True)
        )
        for rows, columns in compared
    ]
    pictures = []
    if outputs:
        arguments = batch, images, targets, predicted
        pictures = [pool.submit(outputs.save, *each) for each in zip(*arguments, strict=True)]
    return _Started(batch, counts, pictures)


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
