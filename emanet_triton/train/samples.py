"""Training samples: which image an iteration takes, how it is augmented, and who reads it."""

import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from torch.utils.data import Dataset as TorchDataset

from emanet_triton.data.dataset import Dataset, Sample
from emanet_triton.errors import InputError, first_line
from emanet_triton.train.augment import Augmentation, Crop, augment


class Draw(NamedTuple):
    """A training sample to make.

    Attributes:
        image: its index among the data set's samples.
        position: of the sample in the whole training, over all ranks; it chooses the stream of
            random numbers.
    """

    image: int
    position: int


class Batch(NamedTuple):
    """Training samples of one forward pass.

    Attributes:
        images: uint8 RGB [B, H, W, 3]; 0 outside ``sizes``.
        labels: train ids, uint8 [B, H, W].
        sizes: (height, width) of the part that each image covers, int64 [B, 2].
        problem: why a sample cannot be read, or ``None``; then the tensors are empty.
    """

    images: Tensor
    labels: Tensor
    sizes: Tensor
    problem: str | None = None


class Crops(TorchDataset):
    """Makes training samples; each has a random stream of its own, so no order changes it.

    Args:
        samples: images and labels.
        dataset: reads them.
        how: their augmentation.
        seed: of all streams.
    """

    def __init__(
        self, samples: Sequence[Sample], dataset: Dataset, how: Augmentation, seed: int
    ) -> None:
        self.samples, self.dataset, self.how, self.seed = samples, dataset, how, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw) -> Crop | InputError:
        """The sample, or the error of its files: an error of a worker would lose its text."""
        try:
            image, labels = self.dataset.read(self.samples[draw.image])
        except InputError as error:
            return error
        rng = np.random.RandomState([self.seed, *divmod(draw.position, 2**32)])
        try:
            return augment(image, labels, self.how, rng)
        except (cv2.error, MemoryError) as error:
            path = self.samples[draw.image].image
            return InputError(f"{path}: cannot be resized ({first_line(error)})")


class Batches(Sampler[list[Draw]]):
    """The endless batches of one rank: the images in a new random order in each epoch.

    Batches cross the ends of epochs, so a set of one image is enough. The ranks' batches of one
    forward pass are together what one rank would take, if the number of images is divisible by
    the number of ranks; otherwise ``DistributedSampler`` repeats some images in each epoch.

    Args:
        images: their number in the data set.
        size: images of a batch.
        seed: of the orders.
        rank, ranks: number of this process, and of processes.
        first: the first batch, counted from the start of the training.
    """

    def __init__(
        self, images: int, size: int, seed: int, rank: int = 0, ranks: int = 1, first: int = 0
    ) -> None:
        self.size, self.rank, self.ranks, self.first = size, rank, ranks, first
        self._epochs: DistributedSampler = DistributedSampler(
            range(images),  # type: ignore[arg-type]  # it only needs a length
            ranks,
            rank,
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[Draw]]:
        begin = self.first * self.size
        epoch, skipped = divmod(begin, len(self._epochs))
        indices = itertools.islice(self._indices(epoch), skipped, None)
        places = (number * self.ranks + self.rank for number in itertools.count(begin))
        draws = map(Draw, indices, places)
        while True:
            yield list(itertools.islice(draws, self.size))

    def _indices(self, epoch: int) -> Iterator[int]:
        for each in itertools.count(epoch):
            self._epochs.set_epoch(each)
            yield from self._epochs


def load(crops: Crops, batches: Batches, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Yield the batches, made by ``workers`` processes, or by this process if it is 0."""
    forks = workers and "fork" in multiprocessing.get_all_start_methods()
    loader = DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collated,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # A data set holds functions, which other ways of starting would have to pickle.
        multiprocessing_context="fork" if forks else None,
    )
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # ends OpenCV's threads, for which a forked process would wait for ever
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = signal.getsignal(number) if number else None
    try:
        return iter(loader)
    finally:
        cv2.setNumThreads(threads)
        if number:
            # PyTorch's handler would raise in the middle of an iteration when a worker ends.
            # Without it the next batch raises.
            signal.signal(number, handler)


@contextlib.contextmanager
def ending(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """End the processes of ``load`` when the block ends, also by an exception.

    The traceback of an uncaught exception keeps the iterator, and so its processes. Python would
    wait for them for ever when it exits, because they ignore its signal.
    """
    try:
        yield batches
    finally:
        if hasattr(batches, "_shutdown_workers"):  # there are processes
            batches._shutdown_workers()


def _collated(crops: list[Crop | InputError]) -> Batch:
    for crop in crops:
        if isinstance(crop, InputError):
            nothing = torch.empty(0)
            return Batch(nothing, nothing, nothing, str(crop))
    images, labels, sizes = zip(*crops, strict=True)
    images, labels, sizes = (torch.from_numpy(np.stack(each)) for each in (images, labels, sizes))
    return Batch(images, labels, sizes)


def _start_worker(number: int) -> None:
    """Leave signals to the process that waits for this one, which ends when that process does.

    A terminal and a scheduler send them to all processes of a group.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no hangup
            signal.signal(getattr(signal, name), signal.SIG_IGN)
