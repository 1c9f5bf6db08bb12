"""Reading safetensors in memory, and writing them."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import refusal_of
from safetensors.torch import load, save

from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LONG = {"dtype": "F32", "shape": [1] * 200_000, "data_offsets": [0, 4]}


def write(path: Path, header: Any, size: int = 16, length: int | None = None) -> Path:
    """A file of that header, as a dict or as text, and ``size`` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(length or 0)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(size)))
    return path


@pytest.mark.parametrize("length", [15384, 0x3C20, 0x3C0A, 80928])
def test_a_header_may_have_any_length(tmp_path, length):
    """Some lengths begin as a web page does: 0x3C20 is a space and "<"."""
    path = write(tmp_path / "x", {"w": ENTRY}, length=length)
    assert read_checkpoint(path).state_dict["w"].shape == (2, 2)


@pytest.mark.parametrize("length", [100, 101, 103])
def test_misaligned_tensors_are_moved(tmp_path, length):
    path = write(tmp_path / "x", {"w": ENTRY}, length=length)
    value = read_checkpoint(path).state_dict["w"]
    assert value.data_ptr() % 4 == 0
    assert value.view(-1).view(torch.uint8).tolist() == list(range(16))


@pytest.mark.parametrize(
    ("header", "size", "reason"),
    [
        ({"w": ENTRY | {"data_offsets": [0, 15]}}, 16, "w has another size than it claims"),
        ({"w": ENTRY | {"shape": [2**62, 4]}}, 16, "w has another size than it claims"),
        ({"w": ENTRY | {"shape": [-2, -2]}}, 16, "the header describes w strangely"),
        ({"w": LONG}, 4, "w has more than 25 dimensions"),
        ({"w": ENTRY | {"dtype": "F31"}}, 16, "the dtype of w is unknown"),
        ({"\x1b": []}, 16, "the header describes \\x1b strangely"),
        ({"w": ENTRY}, 17, "its tensors do not end where the file does"),
        ({"w": ENTRY}, 15, "its tensors do not end where the file does"),
        ({"w": ENTRY, "v": ENTRY}, 16, "its tensors do not lie one after the other"),
        (b'{"w":1,"w":2}', 16, "its header names something twice"),
        (b'{"a":' * 100_000, 16, "its header is no JSON"),
        (b"{" + b" " * (1 << 22), 16, "its header is longer than 4194304 bytes"),
        ({"__metadata__": {"a": 1}, "w": ENTRY}, 16, "its metadata are no texts"),
    ],
    ids=[
        *("offsets", "huge-shape", "negative-shape", "dimensions", "dtype", "control-character"),
        *("longer", "shorter", "overlap", "twice", "nested", "long-header", "metadata"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, size, reason):
    path = write(tmp_path / "x", header, size)
    start = time.process_time()
    message = refusal_of(path)
    assert time.process_time() - start < 5
    assert message.startswith(f"cannot be read ({reason}): damaged or not a checkpoint")


def test_writes_what_the_library_writes():
    weights = {
        "b": torch.randn(3, 2).half(),
        "a": torch.randn(2, 3).t(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 2),
        "one": torch.empty_strided((1,), (5,)).fill_(2.0),
        "flag": torch.tensor([True, False]),
    }
    data = write_safetensors(weights, {"format": "pt"})
    contiguous = {key: value.clone().contiguous() for key, value in weights.items()}
    contiguous["one"] = torch.tensor([2.0])
    assert load(data).keys() == weights.keys()
    assert all(torch.equal(load(data)[key], value) for key, value in weights.items())
    assert len(data) == len(save(contiguous, {"format": "pt"}))
