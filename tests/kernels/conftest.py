"""Settings of the kernels' tests."""

import numpy as np
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
def ordered_products(monkeypatch):
    """Triton's interpreter sums the products of every element in the same order.

    It calls NumPy's matmul, where on some CPUs an element's bits depend on its row.
    """

    def matmul(a, b, dtype):
        return np.multiply(a[..., None], b[..., None, :, :], dtype=dtype).sum(-2)

    monkeypatch.setattr(np, "matmul", matmul)


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
