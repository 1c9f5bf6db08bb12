"""Two processes under torchrun against one process: losses, weights, files, errors."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from kills import TORCHRUN
from small_trainings import options

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.train.group import has_lost_others

# Small steps: ReLUs near 0 would else make the losses of later iterations differ.
EQUAL = {"iterations": 3, "log_every": 1, "val_every": 3, "lr": 1e-4, "dropout": 0}


def run(ranks, *arguments):
    module = ["-m", "emanet_triton.train", *map(str, arguments)]
    command = [
        sys.executable,
        *(TORCHRUN if ranks > 1 else ()),
        *([str(ranks)] if ranks > 1 else ()),
    ]
    return subprocess.run(
        [*command, *module],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def log(folder, name="train.csv"):
    with (folder / name).open(newline="") as file:
        return [[float(value) for value in row[:6]] for row in list(csv.reader(file))[1:]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, scenes):
    """The results of one process, and of two with the same batches."""
    found = []
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks{ranks}") / "out"
        done = run(ranks, *options(scenes, out=out, **EQUAL))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("iteration 1/3") == 1  # the first process alone prints
        found.append(out)
    return found


def test_losses(folders):
    one, two = map(log, folders)
    for ours, theirs in zip(one, two, strict=True):
        assert ours[:4] == pytest.approx(theirs[:4], rel=1e-6)  # iteration and losses
        assert ours[5] == theirs[5]  # learning rate
    for ours, theirs in zip(*(log(folder, "val.csv") for folder in folders), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_weights_statistics_and_bases(folders):
    one, two = (read_checkpoint(folder / "last.safetensors").state_dict for folder in folders)
    for key, value in one.items():
        assert torch.allclose(value.double(), two[key].double(), rtol=1e-3, atol=1e-5), key


def test_resumed_to_the_bit(folders, scenes, tmp_path):
    halves = tmp_path / "halves"
    code = (
        "import sys; from emanet_triton.train.trainer import Trainer; import os, signal\n"
        "step = Trainer.step\n"
        "def stopping(self, *a, **k):\n"
        "    result = step(self, *a, **k)\n"
        "    if self.iteration == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return result\n"
        "Trainer.step = stopping\n"
        "from emanet_triton.command import run; from emanet_triton.train.__main__ import main\n"
        "run(main)\n"
    )
    script = tmp_path / "stopping.py"
    script.write_text(code)
    command = [sys.executable, *TORCHRUN, "2", str(script)]
    stopped = subprocess.run(
        [*command, *options(scenes, out=halves, **EQUAL, save_every=100)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert stopped.returncode != 0
    assert "interrupted; 2 iterations are kept, --resume goes on from there" in stopped.stderr
    assert run(2, *options(scenes, out=halves, resume=True, **EQUAL)).returncode == 0
    same = "last.safetensors"
    assert (folders[1] / same).read_bytes() == (halves / same).read_bytes()


def test_a_damaged_label_is_told_once(own_scenes, tmp_path):
    path = CITYSCAPES.find_samples(own_scenes, "train")[3].label
    path.write_bytes(b"damaged")
    done = run(2, *options(own_scenes, out=tmp_path / "out", no_check=True, iterations=12))
    assert done.returncode != 0
    assert done.stderr.count(f"error: {path}: not a readable PNG") == 1


def test_an_error_of_a_connection_is_told_from_others():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer"
    assert has_lost_others(RuntimeError(gloo))
    assert has_lost_others(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not has_lost_others(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))
