"""Bad input gets one message, exit code 2, and loses nothing that was saved."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_trainings import options, write_small_scenes
from torch._inductor import config as inductor

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Dataset
from emanet_triton.data.png import read_label_png, write_png
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.train import folder
from emanet_triton.train.__main__ import main
from emanet_triton.train.trainer import Trainer

STEP, READ, WRITE = Trainer.step, Dataset.read, folder.write_output

CRASH = """
from emanet_triton.command import run
from emanet_triton.train.__main__ import main
from emanet_triton.train.trainer import Trainer

def crash(self, *arguments, **options):
    raise RuntimeError("a mistake of the program")

Trainer.step = crash
run(main)
"""


def after(number, action):
    """A stand-in for ``Trainer.step`` that does something once, after iteration ``number``."""

    def step(self, *arguments, **options):
        result = STEP(self, *arguments, **options)
        if self.iteration == number:
            action(self)
        return result

    return step


def weights(folder):
    return (folder / "last.safetensors").read_bytes()


def labels_of(root, split="train"):
    return [sample.label for sample in CITYSCAPES.find_samples(root, split)]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "emanet_r18"}, "unknown model 'emanet_r18'"),
        ({"init": "nowhere.pth", "model": None}, "nowhere.pth: no such file"),
        ({"init": "none", "model": None}, "--model is missing"),
        ({"init": None}, "expected --init with a checkpoint or the name of a model"),
        ({"backbone": "r50.pth"}, "--init gives all weights, --backbone some of them"),
        ({"batch-size": 3, "accumulate": 2}, "--batch-size 3: cannot be split into 2 equal parts"),
        ({"crop": "8x8", "batch-size": 1}, "--crop 8x8: gives one value a channel"),
        ({"crop": "8"}, "argument --crop: expected two sizes such as 512x1024, got '8'"),
        (
            {"crop": "100000x10000"},
            "argument --crop: expected sides of 1 to 16384 pixels, got '100000x10000'",
        ),
        ({"ratios": "2,1"}, "argument --ratios: expected LOW,HIGH with LOW at most HIGH"),
        ({"lr": "0"}, "argument --lr: expected a number above 0 and at most 1e+30, got '0'"),
        ({"lr": "1e300"}, "argument --lr: expected a number above 0 and at most 1e+30, got"),
        ({"weight-decay": "1e300"}, "argument --weight-decay: expected a number of 0 to 1e+30"),
        ({"iterations": 2**32}, "argument --iterations: expected at most 4294967295, got 4294967"),
        ({"dropout": "1.5"}, "argument --dropout: expected a number of 0 to 1, got '1.5'"),
        ({"seed": "-1"}, "argument --seed"),
        ({"seed": str(2**32)}, "argument --seed: expected at most 4294967295"),
        ({"workers": "x"}, "argument --workers: expected a whole number of at least 0"),
        ({"train-split": "tests"}, "has no 'tests', it has: train, val"),
        ({"precision": "tf32"}, "argument --precision"),
        ({"device": "cuda:99"}, "--device cuda:99: no such device here"),
        ({"resume": True}, "--resume: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_arguments(scenes, tmp_path, fails, changed, said):
    assert said in fails(*options(scenes, out=tmp_path / "out", **changed))


def test_compile_without_a_compiler(scenes, tmp_path, fails, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        said = fails(*options(scenes, out=tmp_path / "out", compile=True))
    assert said == (
        "error: --compile: the C++ compiler 'g++' cannot be run; expected g++, or another one "
        "that the environment variable CXX names"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(scenes, tmp_path, fails):
    (tmp_path / "file").touch()
    said = fails(*options(scenes, out=tmp_path / "file" / "out"))
    assert "expected a folder that can be written" in said


def test_label_ids_out_of_range_are_found_before_the_training(own_scenes, tmp_path, fails):
    bad = labels_of(own_scenes)[1:3]
    for path in bad:
        write_png(path, np.full((64, 128), 77, np.uint8))
    said = fails(*options(own_scenes, out=tmp_path / "out"))
    assert "error: 2 problems in the data set:" in said
    for path in bad:
        assert f"{path}: illegal labelIds 77; expected 0 to 33, or 255 for -1" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_validation_image_of_another_size_than_its_label(own_scenes, tmp_path, fails):
    path = labels_of(own_scenes, "val")[0]
    write_png(path, np.zeros((10, 10), np.uint8))
    assert f"{path}: 10x10 pixels, its image has 128x64" in fails(
        *options(own_scenes, out=tmp_path / "out")
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_becomes_unreadable_during_the_training(
    own_scenes, scenes, tmp_path, fails, monkeypatch, workers
):
    long = {"iterations": 12, "save_every": 100, "val_every": 100, "log_every": 100}
    path = labels_of(own_scenes)[0]
    whole = path.read_bytes()
    monkeypatch.setattr(Trainer, "step", after(3, lambda trainer: path.write_bytes(b"")))
    out = tmp_path / "out"
    said = fails(*options(own_scenes, out=out, workers=workers, **long))
    assert f"error: {path}: not a readable PNG" in said
    assert "iterations are kept, --resume goes on from there" in said
    finished = torch.load(out / "state.pth", weights_only=True)["trainer"]["iteration"]
    assert 3 <= finished < 12
    monkeypatch.undo()
    path.write_bytes(whole)
    assert main(options(own_scenes, out=out, resume=True, **long)) == 0
    assert main(options(scenes, out=tmp_path / "undisturbed", **long)) == 0
    assert weights(out) == weights(tmp_path / "undisturbed")


def test_a_signal_ends_after_the_iteration_and_saves_it(scenes, tmp_path, fails, monkeypatch):
    many = {"iterations": 6, "save_every": 100, "val_every": 100}
    interrupt = after(2, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Trainer, "step", interrupt)
    said = fails(*options(scenes, out=tmp_path / "out", **many))
    assert said.endswith("interrupted; 2 iterations are kept, --resume goes on from there")
    monkeypatch.undo()
    assert main(options(scenes, out=tmp_path / "out", resume=True, **many)) == 0
    assert main(options(scenes, out=tmp_path / "undisturbed", **many)) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed")


def test_a_signal_to_the_whole_group_is_no_loss(scenes, tmp_path):
    """As schedulers and closing terminals send it: to the workers, too."""
    arguments = options(
        scenes, out=tmp_path, iterations=4000, save_every=4000, val_split="none", workers=2
    )
    with subprocess.Popen(
        [sys.executable, "-m", "emanet_triton.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        process.stdout.readline()  # two iterations are done
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "iterations are kept, --resume goes on from there" in err.splitlines()[-1]
    assert torch.load(tmp_path / "state.pth", weights_only=True)["trainer"]["iteration"] >= 2


def test_a_worker_that_is_killed(scenes, tmp_path, fails, monkeypatch):
    def kill(trainer):
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(Trainer, "step", after(2, kill))
    said = fails(*options(scenes, out=tmp_path, workers=1, iterations=40, save_every=100))
    assert "a process that makes samples has ended" in said
    assert "kept, --resume goes on from there" in said


@pytest.mark.parametrize("dry_run", [None, True], ids=["training", "dry run"])
def test_an_error_of_the_program_ends_it_with_its_workers(scenes, tmp_path, dry_run):
    """The traceback of an uncaught error keeps the iterator of the samples."""
    arguments = options(scenes, out=tmp_path, workers=1, dry_run=dry_run)
    with subprocess.Popen(
        [sys.executable, "-c", CRASH, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, err = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert "RuntimeError: a mistake of the program" in err


def test_nothing_is_kept_before_the_first_iteration(own_scenes, tmp_path, fails):
    for path in labels_of(own_scenes):
        path.write_bytes(b"damaged")
    said = fails(*options(own_scenes, out=tmp_path / "out", no_check=True))
    assert said.endswith("; nothing was trained yet")


def test_a_resize_that_is_too_large(scenes, tmp_path, fails):
    said = fails(*options(scenes, out=tmp_path, ratios="1e5,1e5"))
    assert "cannot be resized" in said


def test_a_signal_ends_a_validation(scenes, tmp_path, fails, monkeypatch):
    def interrupted(self, sample):
        if sample.name.endswith("000000") and "val" in sample.image.parts:
            os.kill(os.getpid(), signal.SIGINT)
        return READ(self, sample)

    monkeypatch.setattr(Dataset, "read", interrupted)
    said = fails(*options(scenes, out=tmp_path))
    assert said.endswith("interrupted; 2 iterations are kept, --resume goes on from there")
    monkeypatch.undo()
    assert main(options(scenes, out=tmp_path, resume=True)) == 0


def test_too_little_memory_for_a_dry_run(scenes, tmp_path, fails, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(Trainer, "step", full)
    assert "too little memory for an iteration" in fails(
        *options(scenes, out=tmp_path, dry_run=True)
    )


@pytest.mark.parametrize("name", ["iter_4.safetensors", "last.safetensors", "state.pth"])
def test_an_iteration_whose_files_were_not_all_written(scenes, tmp_path, monkeypatch, name):
    """As if the process were killed before it writes one of them."""
    often = {"save_every": 2, "keep_every": 2}

    def write(path, data):
        state = path.parent / "state.pth"
        earlier = torch.load(state, weights_only=True) if state.exists() else {"validated": 0}
        if path.name == name and earlier["validated"] == 2:
            raise KeyboardInterrupt
        return WRITE(path, data)

    monkeypatch.setattr(folder, "write_output", write)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert main(options(scenes, out=out, **often)) == 2
    monkeypatch.undo()
    assert main(options(scenes, out=out, **often, resume=True)) == 0
    assert main(options(scenes, out=undisturbed, **often)) == 0
    names = {path.name for path in undisturbed.iterdir()}
    assert {"iter_2.safetensors", "iter_4.safetensors"} < names
    for each in names - {"state.pth", "train.csv"}:
        assert (out / each).read_bytes() == (undisturbed / each).read_bytes(), each


def test_a_loss_that_is_not_finite(scenes, tmp_path, fails):
    said = fails(*options(scenes, out=tmp_path, lr=1e30, min_lr=1e30, save_every=100))
    assert "the loss is not finite after iteration 2; expected a lower --lr" in said
    assert said.endswith("; no state was saved")
    assert not (tmp_path / "state.pth").exists()


def test_weights_that_are_not_finite_replace_no_state(scenes, tmp_path, fails, monkeypatch):
    """The loss of the last step is still finite."""

    def diverge(trainer):
        next(trainer.network.parameters()).data.fill_(torch.inf)

    monkeypatch.setattr(Trainer, "step", after(2, diverge))
    said = fails(*options(scenes, out=tmp_path))
    assert "the network is not finite after iteration 2; expected a lower --lr" in said
    assert said.endswith("; earlier states are kept")
    assert torch.load(tmp_path / "state.pth", weights_only=True)["trainer"]["iteration"] == 1


def test_too_little_memory(scenes, tmp_path, fails, monkeypatch):
    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "step", after(2, full))
    said = fails(*options(scenes, out=tmp_path))
    assert "too little memory for an iteration (CUDA out of memory." in said
    assert "--accumulate" in said
    assert torch.load(tmp_path / "state.pth", weights_only=True)["trainer"]["iteration"] == 1


def test_crops_larger_than_the_images_are_padded(scenes, tmp_path):
    large = {"crop": "200x300", "iterations": 1}
    assert main(options(scenes, out=tmp_path, **large)) == 0


def test_one_image(tmp_path):
    root = write_small_scenes(tmp_path / "scenes", train=1, val=1)
    assert main(options(root, out=tmp_path / "out")) == 0


def test_labels_that_are_all_ignored(own_scenes, tmp_path):
    for path in labels_of(own_scenes) + labels_of(own_scenes, "val"):
        write_png(path, np.zeros_like(read_label_png(path)))
    assert main(options(own_scenes, out=tmp_path / "out", class_balance=0.5)) == 0
    found = read_checkpoint(tmp_path / "out" / "last.safetensors")
    assert all(value.isfinite().all() for value in found.state_dict.values())


def test_without_tensorboard(scenes, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = fails(*options(scenes, out=tmp_path / "out", tensorboard=True))
    assert "--tensorboard needs the package tensorboard: pip install '.[train]'" in said
