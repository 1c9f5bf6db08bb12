"""Files that are no checkpoints, or that cannot be trusted, are refused."""

import math
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    FORMATS,
    assert_weights,
    call,
    flip_bit,
    named,
    published,
    refusal_of,
    rewrite_zip,
    save,
    weights,
)

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint

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
                "text": b"version 1 of the weights\n",
                "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
                "random": bytes(range(1, 255)) * 9,
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
        ("pointer", "is a pointer of Git LFS; "),
        ("random", "is of no known format"),
        ("empty zip", "is of no known format"),
        ("safetensors header", "cannot be read (its header ends beyond the file)"),
    ],
)
def test_refuses_what_is_no_checkpoint(tmp_path, kind, expected):
    message = refusal_of(bad_file(kind, tmp_path))
    assert message.startswith(expected)
    assert (
        "expected a PyTorch (.pth), PaddlePaddle (.pdparams) or safetensors checkpoint" in message
    )


def test_names_a_pickle_of_another_kind(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps([1, 2], protocol=2))
    assert refusal_of(path) == (
        "is a pickle, but not one of torch.save or paddle.save: load it where it was made, "
        "and torch.save(model.state_dict(), ...)"
    )


def test_refuses_unreadable_file(tmp_path, monkeypatch):
    path = save(weights(), tmp_path / "x.pth")

    def deny(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", deny)
    assert refusal_of(path) == "cannot be read: Permission denied"


@pytest.mark.parametrize("kind", FORMATS)
def test_refuses_truncated_file(tmp_path, kind):
    path = save(dict(weights()), tmp_path / "x", kind)
    whole = path.read_bytes()
    for length in range(1, len(whole), 23):
        path.write_bytes(whole[:length])
        refusal_of(path)


def test_refuses_flipped_bit_in_zip_weights(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    flip_bit(path, path.read_bytes().index(weights()["conv.weight"].numpy().tobytes()) + 100)
    assert "cannot be read (wrong CRC of x/data/0)" in refusal_of(path)


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


def test_names_a_file_without_crcs(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(weights(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert refusal_of(path) == (
        "was saved without CRCs, so nobody can see whether it is damaged: load it, and save it "
        "again after torch.serialization.set_crc32_options(True)"
    )


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_names_a_zip_around_a_checkpoint(tmp_path, compression):
    path = save(weights(), tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", compression) as archive:
        archive.write(path, "run/x.pth")
    assert refusal_of(tmp_path / "x.zip") == (
        "is a zip that holds run/x.pth; expected a checkpoint itself: unpack it"
    )


def test_refuses_compressed_zip(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    rewrite_zip(path, lambda data: data, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
    assert total < path.stat().st_size  # by its sizes alone it would pass
    assert "compressed or claim more bytes than it has" in refusal_of(path)


def test_refuses_zip_that_claims_more_than_it_has(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    data = bytearray(path.read_bytes())
    first = data.index(b"PK\x01\x02")
    size = first + 24  # of the first entry in the central directory
    data[size : size + 4] = struct.pack("<I", len(data) * 2)
    path.write_bytes(data)
    assert "compressed or claim more bytes than it has" in refusal_of(path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_refuses_tensor_larger_than_the_file(tmp_path, kind):
    path = save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "x.pth", kind)
    assert refusal_of(path) == "w claims to be larger than the whole file"


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
    message = refusal_of(save(content, tmp_path / "x.pth", kind))
    assert message.startswith(f"asks to run {os.system.__module__}.system")
    assert not marker.exists()


def test_never_runs_a_bare_pickle_bomb(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    assert "asks to run posix.system" in refusal_of(path)
    assert not marker.exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


GETATTR = named("builtins.getattr")
HISTORY = named("mmengine.logging.history_buffer.HistoryBuffer")


def with_last_value(folder: Path, opcodes: bytes) -> Path:
    """A file whose last value in the state dict the opcodes make."""
    path = save({"w": torch.zeros(1), "x": None}, folder / "x.pth")

    def put(data: bytes) -> bytes:
        assert data.count(b"Nu.") == 1  # the value of "x", at the end of the dict
        return data.replace(b"Nu.", opcodes + b"u.")

    rewrite_zip(path, put)
    return path


@pytest.mark.parametrize(
    ("opcodes", "name"),
    [
        (b"cbuiltins\neval\n", "eval"),
        (b"c__builtin__\nexecfile\n", "execfile"),
        (b"csubprocess\nPopen\n", "subprocess.Popen"),
        (b"cos.path\njoin\n", "os.path.join"),
        (b"\x80\x04" + text("shutil") + text("rmtree") + b"\x93", "shutil.rmtree"),
        (b"clogging\nos.system\n", "logging.os.system"),
    ],
    ids=["eval", "python2", "subprocess", "submodule", "protocol4", "dotted"],
)
def test_names_what_could_harm(tmp_path, opcodes, name):
    assert refusal_of(with_last_value(tmp_path, opcodes)) == (
        f"asks to run {name}, which no checkpoint needs: refused; "
        "expected a PyTorch (.pth), PaddlePaddle (.pdparams) or safetensors checkpoint"
    )


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_named_tuples_of_the_machine_are_no_alarm(tmp_path, kind):
    machine = [os.uname(), tmp_path.stat(), os.statvfs(tmp_path), os.times()]
    machine.append(os.terminal_size((80, 24)))
    path = save({"state_dict": weights(), "machine": machine}, tmp_path / "x.pth", kind)
    assert_weights(read_checkpoint(path).state_dict)


@pytest.mark.parametrize(
    "opcodes",
    [
        call(call(GETATTR, HISTORY, text("__class__")), text("x")),
        call(call(HISTORY), text("x")),
        named("numpy.load"),
    ],
    ids=["call-getattr", "call-instance", "numpy.load"],
)
def test_nothing_is_called_and_no_result_is_a_weight(tmp_path, opcodes):
    assert refusal_of(with_last_value(tmp_path, opcodes)) == (
        "expected a state dict of tensors, but 1 of 2 entries are something else, first 'x'"
    )


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
    message = refusal_of(save(content, tmp_path / "x", kind))
    assert message == (
        "expected finite weights, but 2 of 5 tensors hold NaN or infinity in float32, first a"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "holds no weights; expected a state dict of tensors"),
        ({"state_dict": {}, "meta": {}}, "holds no weights; expected a state dict of tensors"),
        ({"state_dict": [1]}, "holds no weights; expected a state dict of tensors"),
        (
            {"epoch": 3, "model": None},
            "expected a state dict of tensors, but 2 of 2 entries are something else, "
            "first 'epoch'",
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
    ids=["empty", "empty-inside", "list", "no-tensors", "numpy", "integer-key", "sparse"],
)
def test_refuses_what_is_no_state_dict(tmp_path, content, expected):
    assert refusal_of(save(content, tmp_path / "x.pth")) == expected


def test_refuses_a_lone_tensor(tmp_path):
    path = save(torch.ones(3), tmp_path / "x.pth")
    assert refusal_of(path).startswith("holds no weights; expected a state dict of tensors")


def test_refuses_what_becomes_infinite_in_float32(tmp_path):
    content = {"w": torch.tensor([1.0, 1e39], dtype=torch.float64)}
    assert refusal_of(save(content, tmp_path / "x.pth")) == (
        "expected finite weights, but 1 of 1 tensors hold NaN or infinity in float32, first w"
    )


def test_refuses_negative_variances(tmp_path):
    content = {"bn.running_var": torch.tensor([1.0, -1.0])}
    assert refusal_of(save(content, tmp_path / "x.pth")) == (
        "bn.running_var is negative; expected variances"
    )


def test_refuses_complex_weights(tmp_path):
    path = save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pth")
    assert refusal_of(path) == "expected real weights, but w is complex"


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_refuses_many_views_of_one_storage(tmp_path, kind):
    table = torch.ones(1000)
    path = save({str(i): table for i in range(100)}, tmp_path / "x.pth", kind)
    assert refusal_of(path) == "its 100 tensors together claim to be larger than 4 times the file"


def test_never_waits_for_a_pipe(tmp_path):
    path = tmp_path / "x.pth"
    os.mkfifo(path)
    assert refusal_of(path).startswith("is not a file; ")


def test_never_waits_for_a_pipe_that_takes_the_place_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    os.mkfifo(path)
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    assert refusal_of(path).startswith("is not a file; ")


def test_refuses_a_file_larger_than_any_checkpoint_unread(tmp_path):
    path = save(weights(), tmp_path / "x.pth")
    os.truncate(path, (4 << 30) + 1)  # takes no room on the disk
    assert refusal_of(path) == "is larger than 4 GiB; expected the weights of one network"


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("operation", ["clone", "float"])
def test_a_file_for_which_pytorch_has_no_memory(tmp_path, monkeypatch, operation):
    def fail(*_):
        raise RuntimeError(NO_MEMORY)

    content = {"state_dict": weights(), "optimizer": torch.ones(9000)}
    path = save(content, tmp_path / "x.pth")
    monkeypatch.setattr(torch.Tensor, operation, fail)
    assert refusal_of(path) == "cannot be read: it does not fit into the memory"


def test_other_errors_of_pytorch_are_no_refusals(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    path = save(weights(), tmp_path / "x.pth")
    monkeypatch.setattr(torch.Tensor, "float", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        read_checkpoint(path)


def test_names_a_tar_archive(tmp_path):
    path = tmp_path / "x.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert refusal_of(path).startswith("is a tar archive, as PyTorch before 0.1.10 wrote them, too")
