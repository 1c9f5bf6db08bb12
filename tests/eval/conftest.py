"""Settings of the evaluation's tests."""

import pytest
import tiny_eval
import torch


@pytest.fixture
def city(tmp_path):
    return tiny_eval.write_cityscapes(tmp_path / "cityscapes")


@pytest.fixture
def ckpt(tmp_path):
    return tiny_eval.write_checkpoint(tmp_path)


@pytest.fixture
def threads():
    """The number of PyTorch's threads, which is restored at the end."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def command(tmp_path, city, ckpt):
    """The command line that evaluates six images and writes all pictures."""
    out = ["--save-predictions", str(tmp_path / "p"), "--save-overlays", str(tmp_path / "o")]
    return ["--ckpt", str(ckpt), "--data", str(city), *out]
