"""Work shared among threads: what each of them uses, and what it leaves as it was."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emanet_triton.kernels.threads import for_each

CPU = torch.device("cpu")


def test_every_item_runs_once_and_every_thread_has_its_own(three_threads):
    numbers, done = itertools.count(), []

    def make_run():
        number = next(numbers)
        return lambda item: done.append((number, item))

    for_each(make_run, range(7), CPU)
    assert sorted(item for _, item in done) == list(range(7))
    assert {number for number, _ in done} == {0, 1, 2}
    assert next(numbers) == 3


def test_operations_of_every_thread_use_one_thread(three_threads):
    seen = []
    for _ in range(2):  # its first call of PyTorch is not like the later ones
        for_each(lambda: lambda _: seen.append(torch.get_num_threads()), range(6), CPU)
    assert seen == [1] * 12


def test_settings_stay(three_threads):
    for_each(lambda: lambda _: None, range(3), CPU)
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_an_error_reaches_the_caller(three_threads):
    def fail(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 4"):
        for_each(lambda: fail, [4, 4, 4], CPU)
