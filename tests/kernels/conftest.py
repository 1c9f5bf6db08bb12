"""Settings of the kernels' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh allocations hold NaN, so that an element which nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
