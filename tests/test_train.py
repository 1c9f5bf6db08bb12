"""``demo/train.py``, two iterations of it: what it prints last and what it writes."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emanet_triton import create_model
from emanet_triton.models import entries

SCRIPT = Path(__file__).parents[1] / "demo" / "train.py"
SHIPPED = entries.ZOO[entries.DEMO].packaged
TRIAL = ("--iterations", "2", "--scenes", "8", "--held-out", "2")


def train(folder, *arguments):
    command = [sys.executable, str(SCRIPT), *TRIAL, *arguments]
    environment = os.environ | {"TMPDIR": str(folder)}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def left(folder):
    """What is left in a folder, but for what PyTorch's compiler makes when it is imported."""
    return [path.name for path in folder.iterdir() if "inductor" not in path.name]


@pytest.fixture(autouse=True)
def _shipped_weights_stay():
    before = hashlib.sha256(SHIPPED.read_bytes()).digest()
    yield
    assert hashlib.sha256(SHIPPED.read_bytes()).digest() == before


def test_two_iterations_write_a_checkpoint_and_tell_its_figures(tmp_path):
    done = train(tmp_path, "--out", "new/trial.pth")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "new" / "trial.pth"
    meta = torch.load(path, weights_only=True)["meta"]
    assert len(meta["CLASSES"]) == 19
    *lines, figures, written = done.stdout.splitlines()
    number = r"\d+\.\d\d"
    assert re.fullmatch(
        f"mIoU {number}, and with the reconstruction set to zero {number}, to its mean {number}",
        figures,
    )
    assert written == f"trial.pth: {path.stat().st_size} bytes"
    assert any(line.startswith("iteration 2/2  loss") for line in lines)
    new = create_model(entries.DEMO, checkpoint=path).state_dict()
    shipped = create_model(entries.DEMO, pretrained=True).state_dict()
    assert new.keys() == shipped.keys()
    assert all(value.isfinite().all() for value in new.values())
    assert left(tmp_path) == ["new"]  # and no scenes


def test_the_ablation_writes_nothing(tmp_path):
    done = train(tmp_path, "--no-reconstruction", "--out", "trial.pth")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("trained and evaluated without reconstruction")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "."], ".: expected a file to write, this is a folder"),
        (["--out", "trial.pt"], "--out trial.pt: expected a file *.pth"),
        (
            ["--iterations", "0"],
            "argument --iterations: expected a whole number of at least 1, got '0'",
        ),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    done = train(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
