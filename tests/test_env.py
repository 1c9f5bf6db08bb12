"""``emanet-triton env``: what it says, what it keeps to itself, and that it never fails."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from emanet_triton import __version__, env
from emanet_triton.cores import in_words
from emanet_triton.kernels.device import HAS_TRITON
from emanet_triton.models.zoo import list_models, published_path


def values() -> dict[str, str]:
    """The report by name."""
    pairs = (line.partition("  ") for line in env.report().splitlines())
    return {name: value.strip() for name, _, value in pairs}


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_what_it_says(no_gpu, capsys):
    assert env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) - len(line.partition("  ")[2].lstrip()) for line in lines}) == 1
    said = values()
    assert said["emanet_triton"] == __version__
    assert said["torch"] == torch.__version__
    assert said["cores"].endswith(f"{in_words(torch.get_num_threads())} of PyTorch")
    assert said["memory"].endswith("GiB available")
    assert said["auto on cpu"] == "backend torch"
    assert said["gpus"] == "PyTorch finds none"
    names = ("commit", "python", "torchvision", "numpy", "opencv", "triton", "cuda", "cudnn")
    for name in (*names, "driver", "platform", "cpu", "cache", "checkpoints"):
        assert said[name]
        assert not said[name].startswith("unknown (")


def fake_gpus(monkeypatch, *found):
    def properties(index):
        if isinstance(found[index], Exception):
            raise found[index]
        return found[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def test_gpus(cuda, monkeypatch):
    h200 = SimpleNamespace(name="NVIDIA H200", total_memory=140 << 30, major=9, minor=0)
    fake_gpus(monkeypatch, h200, RuntimeError("CUDA error: lost\nCompile with ..."))
    said = values()
    backend = "triton" if HAS_TRITON else "torch"
    assert said["gpu 0"] == (
        f"NVIDIA H200, 140.0 GiB, compute capability 9.0, backend {backend}; convolutions: measured"
    )
    assert said["gpu 1"] == "unknown (CUDA error: lost)"
    assert "gpus" not in said


def test_only_variables_that_change_the_package_are_printed(no_gpu, monkeypatch):
    for name in filter(env._is_printed, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("MY_TRITON_KEY", "hush")
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", "a\nb")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = values()
    assert "hush" not in str(said)
    assert said["EMANET_TRITON_CONV_SEARCH"] == "0"
    assert said["TRITON_CACHE_DIR"] == "a\\nb"
    assert said["CUDA_VISIBLE_DEVICES"] == ""
    assert "OMP_NUM_THREADS" not in said


def test_checkpoints_that_are_there(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    assert values()["checkpoints"] == "none in ~/hub/checkpoints"
    path = published_path(list_models()[1])
    path.parent.mkdir(parents=True)
    path.touch()
    assert values()["checkpoints"] == f"{list_models()[1]} in ~/hub/checkpoints"


# Functions that fail, and the part that is unknown then.
FAILING = {
    "commit": "commit",
    "versions": "versions",
    "triton_version": "versions",
    "driver_version": "driver",
    "cpu_name": "cpu",
    "usable_cores": "cores",
    "auto_backend": "auto on cpu",
    "cache_folder": "cache",
    "published_path": "checkpoints",
    "_memory": "memory",
}


@pytest.mark.parametrize("function", FAILING)
def test_a_part_that_cannot_be_found_is_unknown(no_gpu, monkeypatch, function):
    def fail(*_):
        raise OSError(5, "broken\x1b[2J")

    complete = set(values()) - {"emanet_triton", "python", "torch", "torchvision", "numpy"}
    monkeypatch.setattr(env, function, fail)
    said = values()
    assert said[FAILING[function]] == "unknown ([Errno 5] broken\\x1b[2J)"
    assert sum(value.startswith("unknown (") for value in said.values()) == 1
    assert complete - {"opencv", "triton"} <= set(said)


def test_a_driver_that_cannot_be_asked(monkeypatch):
    def fail():
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert values()["gpus"] == "unknown (no driver)"


def test_the_path_of_the_home_folder_is_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert env._short("/home/me/x") == "~/x"
    assert env._short("/home/men/x") == "/home/men/x"


def test_it_is_quick_and_quiet(tmp_path):
    """Without a network, a git and a home."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "emanet_triton.env"],
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60  # about 5 s, and the tests' machine is busy
    assert done.stdout.startswith("commit")
    assert list(tmp_path.iterdir()) == []
