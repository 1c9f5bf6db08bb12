"""What older versions of PyTorch cannot do."""

import pytest
import torch

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

needs_free_sizes = pytest.mark.skipif(
    VERSION < (2, 14),
    reason="PyTorch before 2.14 exports some networks for part of the sizes only",
)
