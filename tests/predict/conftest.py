"""Settings of the tests of ``python -m emanet_triton.predict``."""

import itertools

import cv2
import pytest
import tiny_eval
import torch
from tiny_models import random_image
from videos import write_video

from emanet_triton.predict.__main__ import main


@pytest.fixture
def ckpt(tmp_path):
    return tiny_eval.write_checkpoint(tmp_path)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path):
    """A folder with five pictures of several kinds and sizes, in two folders."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.jpg", "deep/c.webp", "deep/d.bmp", "deep/er/e.TIFF"]):
        pixels = random_image(24 + 8 * (i % 2), 48, seed=i)
        encoded = cv2.imencode(f".{name.rpartition('.')[2].lower()}", pixels)[1]
        (folder / name).write_bytes(encoded.tobytes())
    (folder / ".hidden.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def clip(tmp_path):
    """A video of 12 frames of 64x32 pixels, 10 a second."""
    path = tmp_path / "clip.mp4"
    write_video(path, [random_image(32, 64, seed=i) for i in range(12)], rate=10.0)
    return path


@pytest.fixture
def predict(tmp_path, ckpt, capsys):
    """Run the command line with the tiny model; return the exit code and what it prints."""

    def run(*arguments, out="out", model=True):
        command = [str(argument) for argument in arguments]
        command += ["--out", str(tmp_path / out)]
        command += ["--ckpt", str(ckpt)] if model else []
        capsys.readouterr()
        code = main(command)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

    return run


@pytest.fixture
def refused(predict):
    """Run a command line that must be refused at once, and return its one message."""

    def run(*arguments, **options) -> str:
        code, out, err = predict(*arguments, **options)
        assert code == 2
        assert out == ""
        (line,) = err.splitlines()
        return line.removeprefix("error: ")

    return run


@pytest.fixture
def interrupt(monkeypatch):
    """Let the call of a module's network with this number raise KeyboardInterrupt."""

    def at(module, number: int) -> None:
        network, calls = module.predict, itertools.count(1)

        def interrupted(*arguments):
            if next(calls) == number:
                raise KeyboardInterrupt
            return network(*arguments)

        monkeypatch.setattr(module, "predict", interrupted)

    return at
