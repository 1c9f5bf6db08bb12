"""Reading checkpoints of every published and trained kind, and refusing all others."""

import hashlib
import math
import os
import pickle
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    FORMATS,
    flip_bit,
    imitate_mmengine,
    published,
    rewrite_zip,
    save,
    trained_0x,
    trained_1x,
    weights,
)

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint


def assert_weights(state_dict: dict[str, torch.Tensor]) -> None:
    expected = weights()
    assert set(state_dict) == set(expected)
    for key, value in state_dict.items():
        assert torch.equal(value, expected[key]), key
        assert value.dtype == expected[key].dtype, key


def refusal(path: Path, *args: str) -> str:
    with pytest.raises(InputError) as error:
        read_checkpoint(path, *args)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message
    return message.removeprefix(f"{path}: ")


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
    before = set(torch.serialization.get_safe_globals())
    checkpoint = read_checkpoint(path)
    assert_weights(checkpoint.state_dict)
    assert set(torch.serialization.get_safe_globals()) == before
    assert checkpoint.meta.items() >= meta.items()
    assert all(isinstance(value, str | int | float) for value in checkpoint.meta.values())


def test_what_training_adds_becomes_stand_ins(tmp_path, monkeypatch):
    imitate_mmengine(monkeypatch)
    path = save(trained_1x(weights()), tmp_path / "x.pth")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"builtins.getattr", "mmengine.logging.history_buffer.HistoryBuffer"} <= set(names)
    assert {"numpy.dtype", "numpy.ndarray"} <= set(names)

    load, loaded = torch.load, []

    def spy(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(torch, "load", spy)
    read_checkpoint(path)
    hub = loaded[0]["message_hub"]
    added = [
        hub["log_scalars"]["train/loss"],
        hub["runtime_info"]["best_mIoU"],
        hub["runtime_info"]["last"],
        loaded[0]["param_schedulers"][0]["eta_min"],
    ]
    assert [type(value).__name__ for value in added] == ["_Inert"] * 4
    assert not any(vars(value) for value in added)


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


def test_strips_module_prefix_of_all_keys_only(tmp_path):
    wrapped = {f"module.{key}": value for key, value in weights().items()}
    path = save(published(wrapped), tmp_path / "x.pth")
    assert_weights(read_checkpoint(path).state_dict)

    save(wrapped | {"other": torch.ones(1)}, path)
    assert set(read_checkpoint(path).state_dict) == {*wrapped, "other"}


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
    message = refusal(path, wrong)
    assert f"its SHA-256 begins with {sha256[:8]}, expected {wrong}" in message


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_published_name_is_verified(tmp_path, kind):
    path = save(weights(), tmp_path / "x.pth", kind)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    path = path.rename(tmp_path / f"emanet_20200901_100301-{sha256[:8]}.pth")
    assert_weights(read_checkpoint(path).state_dict)

    flip_bit(path, path.stat().st_size - 1)
    message = refusal(path)
    assert f"expected {sha256[:8]} as in its name" in message


# Refusing: files


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / "x.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "folder-missing":
        path = folder / "none" / "x.pth"
    elif kind != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "html": b"\r\n<!DOCTYPE html><html><body>404</body></html>",
                "text": b"version https://git-lfs.github.com/spec/v1\n",
                "random": bytes(range(1, 255)) * 9,
                "not a dict": pickle.dumps([1, 2], protocol=2),
                "safetensors header": struct.pack("<Q", 1 << 40) + b'{"a":',
                "empty zip": b"PK\x05\x06" + bytes(18),
            }[kind]
        )
    return path


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("missing", "no such file"),
        ("folder-missing", "no such file"),
        ("folder", "is not a file"),
        ("empty", "is empty"),
        ("html", "is a web page"),
        ("text", "is of no known format"),
        ("random", "is of no known format"),
        ("empty zip", "is of no known format"),
        ("not a dict", "cannot be read (Invalid magic number; corrupt file?)"),
        ("safetensors header", "cannot be read (Error while deserializing header"),
    ],
)
def test_refuses_what_is_no_checkpoint(tmp_path, kind, expected):
    message = refusal(bad_file(kind, tmp_path))
    assert message.startswith(expected)
    assert "expected a PyTorch (.pth) or safetensors checkpoint" in message


def test_refuses_unreadable_file(tmp_path, monkeypatch):
    path = save(weights(), tmp_path / "x.pth")

    def deny(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    assert refusal(path) == "cannot be read: Permission denied"


@pytest.mark.parametrize("kind", FORMATS)
def test_refuses_truncated_file(tmp_path, kind):
    path = save(dict(weights()), tmp_path / "x", kind)
    whole = path.read_bytes()
    for length in range(1, len(whole), 23):
        path.write_bytes(whole[:length])
        refusal(path)


def test_refuses_flipped_bit_in_zip_weights(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    flip_bit(path, path.read_bytes().index(weights()["conv.weight"].numpy().tobytes()) + 100)
    assert "cannot be read (wrong CRC of x/data/0)" in refusal(path)


def test_flipped_bit_anywhere_in_zip_changes_no_weight(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 11):
        path.write_bytes(whole)
        flip_bit(path, position, bit=position % 8)
        try:
            checkpoint = read_checkpoint(path)
        except InputError:
            refused += 1
        else:
            assert_weights(checkpoint.state_dict)
    assert refused > 50


def test_refuses_compressed_zip(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    rewrite_zip(path, lambda data: data, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
    assert total < path.stat().st_size  # by its sizes alone it would pass
    assert "compressed or claim more bytes than it has" in refusal(path)


def test_refuses_zip_that_claims_more_than_it_has(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\x01\x02")
    size = first + 24  # of the first entry in the central directory
    data[size : size + 4] = struct.pack("<I", len(data) * 2)
    path.write_bytes(data)
    assert "compressed or claim more bytes than it has" in refusal(path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_refuses_tensor_larger_than_the_file(tmp_path, kind):
    path = save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "x.pth", kind)
    assert refusal(path) == "w claims to be larger than the whole file"


# Refusing: code


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("beside", [True, False], ids=["in-meta", "in-state-dict"])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_never_runs_a_pickle_bomb(tmp_path, kind, beside):
    marker = tmp_path / "marker"
    content = published(weights())
    content["meta" if beside else "state_dict"]["bomb"] = Bomb(marker)
    before = set(torch.serialization.get_safe_globals())
    message = refusal(save(content, tmp_path / "x.pth", kind))
    assert message.startswith(f"asks to run {os.system.__module__}.system")
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == before


def test_never_runs_a_bare_pickle_bomb(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    assert "asks to run posix.system" in refusal(path)
    assert not marker.exists()


def call(function: bytes, *args: bytes) -> bytes:
    """Opcodes of protocol 2 that call a function with strings or other opcodes."""
    return function + b"(" + b"".join(args) + b"tR"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


GETATTR, HISTORY = b"cbuiltins\ngetattr\n", b"cmmengine.logging.history_buffer\nHistoryBuffer\n"


@pytest.mark.parametrize(
    ("opcodes", "expected"),
    [
        (call(call(GETATTR, HISTORY, text("__class__")), text("x")), "cannot be read (Trying to"),
        (call(call(HISTORY), text("x")), "cannot be read (Trying to call reduce"),
        (b"cbuiltins\neval\n", "asks to run eval"),
        (b"cnumpy\nload\n", "asks to run numpy.load"),
        (b"cmmengine.logging.history_buffer\nnp.load\n", "asks to run mmengine.logging.history_b"),
    ],
    ids=["call-getattr", "call-instance", "eval", "numpy.load", "dotted"],
)
def test_refuses_every_other_global_and_call(tmp_path, opcodes, expected):
    path = save({"w": torch.zeros(1), "x": None}, tmp_path / "x.pth")

    def put(data: bytes) -> bytes:
        assert data.count(b"Nu.") == 1  # the value of "x", at the end of the dict
        return data.replace(b"Nu.", opcodes + b"u.")

    rewrite_zip(path, put)
    assert refusal(path).startswith(expected)


# Refusing: weights


def with_value(shape: tuple[int, ...], value: float) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_weights_that_are_not_finite(tmp_path, kind, value):
    content = dict(weights()) | {
        "a": with_value((2, 2), value),
        "b": with_value((3,), value).half(),
    }
    message = refusal(save(content, tmp_path / "x", kind))
    assert message == ("expected finite weights, but 2 of 5 tensors hold NaN or infinity, first a")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "holds no weights; expected a state dict of tensors"),
        ({"state_dict": {}, "meta": {}}, "holds no weights; expected a state dict of tensors"),
        ({"state_dict": [1]}, "holds no weights; expected a state dict of tensors"),
        (
            {"model": {"w": torch.ones(1)}, "epoch": 3},
            "expected a state dict of tensors, but 2 of 2 entries are something else, "
            "first 'model'",
        ),
        (
            {"state_dict": {"w": torch.ones(1), "n": weights()["bn.running_var"].numpy()}},
            "expected a state dict of tensors, but 1 of 2 entries are something else, first 'n'",
        ),
        (
            {3: torch.ones(1)},
            "expected a state dict of tensors, but 1 of 1 entries are something else, first '3'",
        ),
        (
            {"w": torch.eye(3).to_sparse()},
            "expected a state dict of tensors, but 1 of 1 entries are something else, first 'w'",
        ),
    ],
    ids=["empty", "empty-inside", "list", "other-layout", "numpy", "integer-key", "sparse"],
)
def test_refuses_what_is_no_state_dict(tmp_path, content, expected):
    assert refusal(save(content, tmp_path / "x.pth")) == expected


def test_refuses_a_lone_tensor(tmp_path):
    path = save(torch.ones(3), tmp_path / "x.pth")
    assert refusal(path).startswith("cannot be read (holds no state dict)")
