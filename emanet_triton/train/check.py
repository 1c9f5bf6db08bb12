"""Looking at all files of a data set before a training begins."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from emanet_triton.data.dataset import IGNORE, Dataset, Sample, problems_error
from emanet_triton.progress import Bar
from emanet_triton.train.group import Group, SharedError
from emanet_triton.workers import Workers


def check_files(samples: list[Sample], dataset: Dataset, group: Group, workers: int) -> None:
    """Check the files of all samples; processes and threads share them.

    Raises:
        SharedError: with all problems.
    """
    found = [line for lines in _shared(dataset.check, samples, group, workers) for line in lines]
    problems: list[Any] = [None] * group.count
    if group.count > 1:
        dist.all_gather_object(problems, found, group=group.messages)
    else:
        problems = [found]
    if everything := sorted(line for lines in problems for line in lines):
        number = f"{len(everything)} problem{'s' * (len(everything) > 1)}"
        raise SharedError(str(problems_error(f"{number} in the data set:", everything)))


def class_weights(
    samples: list[Sample], dataset: Dataset, balance: float, group: Group, workers: int
) -> Tensor:
    """The weight of each class in the loss: its share of the pixels to the power ``-balance``.

    Returns:
        float32 [C] with mean 1 over the classes that have pixels; the others get 1.

    Raises:
        SharedError: a label cannot be read.
    """

    def count(sample: Sample) -> np.ndarray:
        return np.bincount(dataset.read_labels(sample).ravel(), minlength=IGNORE + 1)

    def count_all() -> Tensor:
        found = [torch.from_numpy(each) for each in _shared(count, samples, group, workers)]
        return sum(found, torch.zeros(IGNORE + 1, dtype=torch.int64))

    counts = group.together(count_all)
    if group.count > 1:
        dist.all_reduce(counts, group=group.messages)
    pixels = counts[: len(dataset.classes)].double()
    occurs = pixels > 0
    weights = torch.ones_like(pixels)
    # softmax computes ratios of powers, which do not overflow for a large balance
    weights[occurs] = torch.softmax(-balance * pixels[occurs].log(), 0) * occurs.sum()
    return weights.float()


def _shared(
    function: Callable[[Sample], Any], samples: list[Sample], group: Group, workers: int
) -> Iterable[Any]:
    """The function's results for this process's samples."""
    mine = samples[group.rank :: group.count]
    bar = Bar(desc="checking files", total=len(mine), leave=False, disable=not group.first)
    with Workers(workers) as pool, bar:
        for result in pool.map(function, mine, ahead=2 * max(workers, 1)):
            yield result
            bar.update()
