"""Reading checkpoints of every published and trained kind, and refusing all others."""

import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoint_files import (
    FORMATS,
    assert_weights,
    flip_bit,
    imitate_mmengine,
    published,
    refusal_of,
    rewrite_zip,
    save,
    trained_0x,
    trained_1x,
    weights,
)

from emanet_triton.models import checkpoint
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files.inert import Inert
from emanet_triton.models.checkpoint_files.torch_file import read_zip_file

# Reading


@pytest.mark.parametrize("kind", FORMATS)
def test_reads_bare_state_dict(tmp_path, kind):
    path = save(dict(weights()), tmp_path / "x", kind)
    checkpoint = read_checkpoint(str(path))
    assert_weights(checkpoint.state_dict)
    assert checkpoint.path == path
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.meta == {}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "meta"),
    [
        (published, {"mmseg_version": "0.6.0+a90ea42"}),
        (trained_0x, {"mmseg_version": "0.6.0+a90ea42", "iter": 80000, "seed": 0}),
        (trained_1x, {"mmengine_version": "0.10.7", "iter": 80000}),
    ],
)
def test_reads_what_mmseg_writes(tmp_path, kind, content, meta):
    with pytest.MonkeyPatch.context() as patch:
        imitate_mmengine(patch)
        path = save(content(weights()), tmp_path / "x.pth", kind)
    checkpoint = read_checkpoint(path)
    assert_weights(checkpoint.state_dict)
    assert checkpoint.meta.items() >= meta.items()
    assert all(isinstance(value, str | int | float) for value in checkpoint.meta.values())


def test_what_training_adds_becomes_stand_ins(tmp_path, monkeypatch):
    imitate_mmengine(monkeypatch)
    path = save(trained_1x(weights()), tmp_path / "x.pth")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"builtins.getattr", "mmengine.logging.history_buffer.HistoryBuffer"} <= set(names)
    assert {"numpy.dtype", "numpy.ndarray"} <= set(names)

    content = read_zip_file(memoryview(path.read_bytes())).value
    hub = content["message_hub"]
    added = {
        "mmengine.logging.history_buffer.HistoryBuffer": hub["log_scalars"]["train/loss"],
        "numpy._core.multiarray.scalar": hub["runtime_info"]["best_mIoU"],
        "numpy._core.multiarray._reconstruct": hub["runtime_info"]["last"],
    }
    assert {value.path: type(value) for value in added.values()} == dict.fromkeys(added, Inert)


def test_threads_may_read_at_once(tmp_path):
    path = save(trained_0x(weights()), tmp_path / "x.pth")
    with ThreadPoolExecutor(4) as pool:
        for checkpoint in pool.map(read_checkpoint, [path] * 24):
            assert_weights(checkpoint.state_dict)


@pytest.mark.parametrize("package", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_reads_scalars_of_both_numpy_generations(tmp_path, package):
    def rename(data: bytes) -> bytes:
        old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        return old.replace(b"numpy.core.multiarray", package)

    path = save(trained_0x(weights()), tmp_path / "x.pth")
    rewrite_zip(path, rename)
    with zipfile.ZipFile(path) as archive:
        assert b"c" + package + b"\nscalar\n" in archive.read("x/data.pkl")
    assert_weights(read_checkpoint(path).state_dict)


def test_parameters_come_without_gradients(tmp_path):
    path = save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "x.pth")
    value = read_checkpoint(path).state_dict["w"]
    assert type(value) is torch.Tensor
    assert not value.requires_grad


# Hash


def test_hash_prefix_is_verified(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_checkpoint(path, sha256[:8]).sha256 == sha256
    wrong = "0000000f"
    message = refusal_of(path, wrong)
    assert f"its SHA-256 begins with {sha256[:8]}, expected {wrong}" in message


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_published_name_is_verified(tmp_path, kind):
    path = save(weights(), tmp_path / "x.pth", kind)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f"emanet_20200901_100301-{sha256[:8]}.pth")
    assert_weights(read_checkpoint(path).state_dict)

    flip_bit(path, path.stat().st_size - 1)
    message = refusal_of(path)
    assert f"expected {sha256[:8]} as in its name" in message


@pytest.mark.parametrize("date", ["20230915", "15092023", "09152023"])
def test_a_date_in_the_name_is_no_hash(tmp_path, date):
    path = save(weights(), tmp_path / f"my-emanet-{date}.pth")
    assert_weights(read_checkpoint(path).state_dict)


@pytest.mark.parametrize("digits", ["20231301", "12345678", "18000101"])
def test_other_digits_in_the_name_are_a_hash(tmp_path, digits):
    path = save(weights(), tmp_path / f"my-emanet-{digits}.pth")
    assert f"expected {digits} as in its name" in refusal_of(path)


# The weights are those of the hash


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_do_not_follow_the_file(tmp_path, kind):
    path = save(dict(weights()), tmp_path / "x", kind)
    checkpoint = read_checkpoint(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    os.truncate(path, 0)
    assert_weights(checkpoint.state_dict)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_is_opened_once(tmp_path, monkeypatch, kind):
    path = save(dict(weights()), tmp_path / "x", kind)
    opened = []

    def spy(name, *args, open=os.open):
        opened.append(name)
        return open(name, *args)

    monkeypatch.setattr(os, "open", spy)
    read_checkpoint(path)
    assert opened == [path]


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, monkeypatch):
    path = save(weights(), tmp_path / "x.pth")
    size = path.stat().st_size

    def truncate(*head, reader=checkpoint._reader):
        os.truncate(path, size // 2)
        return reader(*head)

    monkeypatch.setattr(checkpoint, "_reader", truncate)
    assert refusal_of(path).startswith("cannot be read (it became shorter while it was read)")
