"""The command line that keeps a checkpoint's weights only."""

import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_eval
import torch
from checkpoint_files import save, tiny_emanet, trained_0x
from checkpoint_files import weights as plain_weights
from golden_data import listed_keys
from safetensors.torch import load_file
from trained_files import CLASSES, TRAINED, write_trained

from emanet_triton import class_names, create_model, palette
from emanet_triton.convert import main
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.chosen import choose
from emanet_triton.models.conversion import convert
from emanet_triton.models.description import Description, description_in
from emanet_triton.models.loading import load_into
from emanet_triton.models.zoo import published_path


def weights() -> dict[str, torch.Tensor]:
    """Three weights of a backbone."""
    return {f"backbone.{key}": value for key, value in plain_weights().items()}


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
        "layout": "mmsegmentation",
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
    source = save({"layer1.a": table, "layer1.b": table, "c": table.t()}, tmp_path / "x.pth")
    assert main([str(source), str(tmp_path / "y.safetensors")]) == 0
    written = load_file(tmp_path / "y.safetensors")
    assert torch.equal(written["layer1.a"], table)
    assert torch.equal(written["layer1.b"], table)
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


def test_a_description_of_a_training_is_kept(tmp_path):
    source = write_trained(tmp_path / "last.safetensors")
    paths = [tmp_path / name for name in ("a.safetensors", "b.pth", "c.safetensors")]
    for earlier, path in pairwise([source, *paths]):
        assert main([str(earlier), str(path)]) == 0
        assert Description.of(read_checkpoint(path).meta) == TRAINED
        assert description_in(path) == TRAINED
        chosen = choose(str(path))
        assert (chosen.name, chosen.protocol) == (TRAINED.model, TRAINED.protocol)
        assert chosen.dataset.description == TRAINED.dataset
        assert create_model(checkpoint=path).description == replace(TRAINED, info={})
    broken = write_trained(tmp_path / "broken.safetensors", {"emanet_triton": "x"})
    with pytest.raises(InputError, match=r"broken\.safetensors: its description of a model is"):
        convert(broken, tmp_path / "d.pth")


@pytest.mark.parametrize("options", [[], ["--to", "mmseg"]])
def test_a_file_for_mmsegmentation(tmp_path, capsys, options):
    source, path = write_trained(tmp_path / "last.safetensors"), tmp_path / "x.pth"
    assert main([str(source), str(path), *options]) == 0
    content = torch.load(path, weights_only=True)
    assert content["meta"]["CLASSES"] == CLASSES
    assert content["meta"]["PALETTE"] == [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    assert type(content["state_dict"]) is OrderedDict
    model = tiny_eval.tiny_network(num_classes=3)
    assert list(content["state_dict"]) == list(model.state_dict())
    assert f"{path}: {len(content['state_dict'])} tensors" in capsys.readouterr().out
    for key, value in model.state_dict().items():
        assert same_bits(content["state_dict"][key], value), key
        assert content["state_dict"][key].untyped_storage().nbytes() == value.nbytes

    back = tmp_path / "back.safetensors"
    assert main([str(path), str(back)]) == 0
    before, after = load_file(source), load_file(back)
    assert before.keys() == after.keys()
    assert all(same_bits(after[key], before[key]) for key in before)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    equal = one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
    return one.dtype == other.dtype and one.shape == other.shape and equal


@pytest.mark.parametrize("name", ["r50", "r101"])
def test_keys_shapes_and_dtypes_of_mmsegmentation(tmp_path, name):
    """From a file in half precision, without counters, of a model that nothing names."""
    weights = {
        key: torch.zeros(shape, dtype=torch.float16)
        for key, shape, dtype in listed_keys(name)
        if dtype == "float32"
    }
    source = tmp_path / "x.safetensors"
    source.write_bytes(write_safetensors(weights, {}))
    del weights
    assert main([str(source), str(tmp_path / "y.pth")]) == 0
    content = torch.load(tmp_path / "y.pth", weights_only=True)
    got = {
        key: (list(value.shape), str(value.dtype).removeprefix("torch."))
        for key, value in content["state_dict"].items()
    }
    assert got == {key: (shape, dtype) for key, shape, dtype in listed_keys(name)}
    assert "CLASSES" not in content["meta"]


def test_the_classes_of_a_published_model(tmp_path):
    """The demonstration is recognised by its name and its hash."""
    published = published_path("emanet_demo")
    convert(published, tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert content["meta"]["CLASSES"] == class_names()
    assert content["meta"]["PALETTE"] == palette().tolist()
    want = torch.load(published, weights_only=True)["state_dict"]
    assert all(same_bits(value, want[key]) for key, value in content["state_dict"].items())


def test_a_network_without_auxiliary_head_keeps_none(tmp_path):
    weights = tiny_eval.tiny_network(3).state_dict()
    weights = {key: value for key, value in weights.items() if "auxiliary" not in key}
    source = tmp_path / "x.safetensors"
    source.write_bytes(write_safetensors(weights, TRAINED.metadata()))
    with pytest.warns(UserWarning, match="has no auxiliary head"):
        convert(source, tmp_path / "y.pth")
    assert read_checkpoint(tmp_path / "y.pth").state_dict.keys() == weights.keys()


@pytest.mark.parametrize("name", ["y.pth", "y.safetensors"])
def test_what_is_no_network(tmp_path, capsys, name):
    source = save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "x.pth")
    message = refused(capsys, source, tmp_path / name)
    assert message == f"{source}: has no backbone; expected the weights of a segmentation network"
    assert not (tmp_path / name).exists()


def test_what_is_no_network_for_mmsegmentation(tmp_path, source, capsys):
    message = refused(capsys, source, tmp_path / "y.pth")
    assert message == (
        f"{source}: has no decode_head; expected the weights of a segmentation network"
    )
    other = tmp_path / "z.safetensors"
    state_dict = tiny_emanet(blocks=(1, 1, 3, 1)).state_dict()
    other.write_bytes(write_safetensors(state_dict, TRAINED.metadata()))
    message = refused(capsys, other, tmp_path / "y.pth")
    assert message.startswith(f"{other}: does not fit the model")
    assert not (tmp_path / "y.pth").exists()


def test_a_name_like_a_published_one(tmp_path, source, capsys):
    destination = tmp_path / "y-12ab34cd.pth"
    assert refused(capsys, source, destination) == (
        f"{destination}: the name must not end like a published one, because 12ab34cd would be the "
        "beginning of the file's SHA-256"
    )
