"""``demo/train.py``, two steps of it: what it prints last and what it writes."""

import errno
import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emanet_triton import create_model
from emanet_triton.errors import InputError
from emanet_triton.models import zoo

SCRIPT = Path(__file__).parents[1] / "demo" / "train.py"
SHIPPED = zoo._WEIGHTS / zoo.ZOO[zoo.DEMO].file
TRIAL = ("--steps", "2", "--scenes", "2", "--held-out", "2")


def train(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *TRIAL, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def _shipped_weights_stay():
    before = hashlib.sha256(SHIPPED.read_bytes()).digest()
    yield
    assert hashlib.sha256(SHIPPED.read_bytes()).digest() == before


def test_two_steps_write_a_checkpoint_and_its_figures(tmp_path):
    done = train(tmp_path, "--out", "new/trial.pth")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "new" / "trial.pth"
    meta = torch.load(path, weights_only=True)["meta"]
    assert len(meta["CLASSES"]) == 19
    figures = meta["figures"]
    names = ("mIoU", "mIoU_zero_reconstruction", "mIoU_mean_reconstruction")
    trained, zero, mean = (f"{figures[name]:.2f}" for name in names)
    assert done.stdout.splitlines()[-2:] == [
        f"mIoU {trained}, and with the reconstruction set to zero {zero}, to its mean {mean}",
        f"trial.pth: {path.stat().st_size} bytes",
    ]
    new = create_model(zoo.DEMO, checkpoint=path).state_dict()
    shipped = create_model(zoo.DEMO, pretrained=True).state_dict()
    assert new.keys() == shipped.keys()
    assert all(value.isfinite().all() for value in new.values())


def test_the_ablation_writes_nothing(tmp_path):
    done = train(tmp_path, "--no-reconstruction", "--out", "trial.pth")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("trained and evaluated without reconstruction")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_given_as_the_file(tmp_path):
    done = train(tmp_path, "--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    message = f"--out {tmp_path}: expected a file to write, this is a folder"
    assert done.stderr.splitlines()[-1] == f"error: {message}"


def test_a_write_that_fails_leaves_the_earlier_weights(tmp_path, monkeypatch):
    def no_space(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    script = runpy.run_path(str(SCRIPT))
    path = tmp_path / "trial.pth"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(Path, "replace", no_space)
    problem = rf"^{path}: cannot be written \(No space left on device\)$"
    with pytest.raises(InputError, match=problem):
        script["save"](create_model(zoo.DEMO), script["Recipe"](), path, {})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("trial.pth", b"earlier")
    ]


def test_a_number_that_is_none(tmp_path):
    done = train(tmp_path, "--steps", "0")
    assert done.returncode == 2
    message = "argument --steps: expected a whole number of at least 1, got '0'"
    assert done.stderr.splitlines()[-1] == f"error: {message}"
