"""Settings of the kernels' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory holds NaN or the largest integer: an element that nobody wrote shows.

    PyTorch only warns about operations that are not deterministic, since a GPU has some.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def three_threads():
    """PyTorch set to use three threads."""
    yield from _with_threads(3)


@pytest.fixture
def one_thread():
    """PyTorch set to use one thread, the calling thread."""
    yield from _with_threads(1)


def _with_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
