"""The command line that keeps a checkpoint's weights only."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import save, tiny_emanet, trained_0x, weights
from safetensors.torch import load_file

from emanet_triton.convert import main
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.loading import load_into


@pytest.fixture
def source(tmp_path) -> Path:
    return save(trained_0x(weights()), tmp_path / "x.pth")


def refused(capsys, *args: object) -> str:
    assert main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_writes_the_weights_alone(tmp_path, capsys, kind):
    source = save(trained_0x(weights()), tmp_path / "x.pth", kind)
    destination = tmp_path / "y.safetensors"
    assert main([str(source), str(destination)]) == 0
    sha256 = hashlib.sha256(destination.read_bytes()).hexdigest()
    assert capsys.readouterr().out == f"{destination}: 3 tensors, 0.0 MB, sha256 {sha256}\n"

    written = load_file(destination)
    assert set(written) == set(weights())
    for key, value in weights().items():
        assert torch.equal(written[key], value), key
    assert read_checkpoint(destination).meta == {
        "format": "pt",
        "source": "x.pth",
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth", "y.safetensors"]


def test_converted_network_loads(tmp_path):
    source = save(tiny_emanet().state_dict(), tmp_path / "x.pth")
    assert main([str(source), str(tmp_path / "y.safetensors")]) == 0
    model = tiny_emanet()
    load_into(model, read_checkpoint(tmp_path / "y.safetensors"))
    expected = torch.load(source, weights_only=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_unties_shared_and_strided_tensors(tmp_path):
    table = torch.arange(6.0).view(2, 3)
    source = save({"a": table, "b": table, "c": table.t()}, tmp_path / "x.pth")
    assert main([str(source), str(tmp_path / "y.safetensors")]) == 0
    written = load_file(tmp_path / "y.safetensors")
    assert torch.equal(written["a"], table)
    assert torch.equal(written["b"], table)
    assert torch.equal(written["c"], table.t())


def test_replaces_a_file_on_request_only(tmp_path, source, capsys):
    destination = tmp_path / "y.safetensors"
    destination.write_text("precious")
    message = refused(capsys, source, destination)
    assert message == f"{destination}: exists already; it is replaced only on request (--force)"
    assert destination.read_text() == "precious"

    assert main([str(source), str(destination), "--force"]) == 0
    assert set(load_file(destination)) == set(weights())


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["same", "symbolic", "hard"])
def test_never_replaces_the_source(tmp_path, source, capsys, link):
    first, second = tmp_path / "y.safetensors", tmp_path / "z.safetensors"
    assert main([str(source), str(first)]) == 0
    capsys.readouterr()
    before = first.read_bytes()
    if link is None:
        second = first
    else:
        link(first, second)
    message = refused(capsys, first, second, "--force")
    assert message == f"{second}: is the source itself; expected another file"
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/y.safetensors", "No such file or directory"),
        ("x.pth/y.safetensors", "Not a directory"),
        ("folder.safetensors", "Is a directory"),
    ],
)
def test_unwritable_destination(tmp_path, source, capsys, name, reason):
    (tmp_path / "folder.safetensors").mkdir()
    destination = tmp_path / name
    message = refused(capsys, source, destination, "--force")
    assert message == f"{destination}: cannot be written ({reason})"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.safetensors", "x.pth"]


def test_a_full_disk_is_one_message(tmp_path, source, capsys, monkeypatch):
    def write(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("emanet_triton.models.conversion.write_whole", write)
    destination = tmp_path / "y.safetensors"
    message = refused(capsys, source, destination)
    assert message == f"{destination}: cannot be written (No space left on device)"


def test_weights_that_do_not_fit_into_the_memory_twice(tmp_path, source, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(torch.Tensor, "contiguous", fail)
    message = refused(capsys, source, tmp_path / "y.safetensors")
    assert message == f"{source}: its weights do not fit into the memory twice"


@pytest.mark.parametrize(
    ("name", "options", "suffixes"),
    [
        ("y", [], ".safetensors or .pth"),
        ("y.pt", [], ".safetensors or .pth"),
        ("y.pth", ["--to", "safetensors"], ".safetensors"),
        ("y.safetensors", ["--to", "mmseg"], ".pth"),
    ],
)
def test_the_destination_must_have_the_suffix_of_its_kind(
    tmp_path, source, capsys, name, options, suffixes
):
    message = refused(capsys, source, tmp_path / name, *options)
    assert message == f"{tmp_path / name}: the converted file's name must end in {suffixes}"


@pytest.mark.parametrize("name", ["y", "y.pth", "y.safetensors", "y-c43fcef1.pth"])
def test_a_bad_destination_is_refused_before_the_source_is_read(
    tmp_path, source, capsys, monkeypatch, name
):
    read = []
    monkeypatch.setattr("emanet_triton.models.conversion.read_checkpoint", read.append)
    (tmp_path / name).touch()
    refused(capsys, source, tmp_path / name)
    assert read == []


def test_bad_source_writes_nothing(tmp_path, capsys):
    source = tmp_path / "x.pth"
    source.write_text("<html>404</html>")
    message = refused(capsys, source, tmp_path / "y.safetensors")
    assert message.startswith(f"{source}: is a web page; expected a PyTorch")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "emanet_triton.convert", str(tmp_path / "none"), "y"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: y: the converted file's name")
    assert "Traceback" not in done.stderr
