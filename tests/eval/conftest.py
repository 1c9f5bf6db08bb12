"""Settings of the evaluation's tests."""

import pytest
import tiny_eval
import torch

from emanet_triton.eval.__main__ import main
from emanet_triton.inference.predictor import Predictor


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


@pytest.fixture
def fails(capsys, monkeypatch):
    """Run a command line that must fail before the network runs, and return its message."""

    def check(*arguments) -> str:
        def forward(*_):
            raise AssertionError("the network ran before everything was checked")

        monkeypatch.setattr(Predictor, "__call__", forward)
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        assert "error: " in err
        return err

    return check
