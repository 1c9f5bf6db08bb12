"""Safetensors files, whole and damaged: header, lengths, offsets, shapes, names."""

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

from tests.fuzz.checkpoint import DTYPES, check_bytes, read_unless_refused

NUMBERS = (0, 1, -1, 3, 4, 16, 2**31, 2**62, 2**64, 10**400, 1.5, "4", None, True, [4], {})
NAMES = ("", "a", "__metadata__", "\x1b[2J", "\ud800", "x" * 3000)


def attempt(seed: int, folder: Path) -> str:
    rng = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i in range(rng.randint(1, 5)):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
        weights[f"w{i}"] = torch.randn(shape, generator=generator).to(rng.choice(DTYPES))
    data = save(weights, {"format": "pt"})
    whole = rng.random() < 0.2
    if not whole:
        data = _damaged(rng, data)
    elif rng.random() < 0.5:
        data = _padded(rng, data)
    path = folder / "file.safetensors"
    path.write_bytes(data)
    read = read_unless_refused(path, whole)
    if read is None:
        return "refused"
    check_bytes(read, data)
    want = weights if whole else load(data)
    assert read.keys() == want.keys()
    for key, value in read.items():
        assert value.dtype == want[key].dtype and torch.equal(value, want[key]), key
    return "right"


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(text: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + tensors


def _padded(rng: Random, data: bytes) -> bytes:
    """A header of any length, also of one that begins like a web page."""
    header, tensors = _split(data)
    text = json.dumps(header).encode()
    size = rng.choice((len(text), len(text) + 3, 0x3C20, 0x3C00 + len(text) % 256, 0x013C20))
    return _joined(text.ljust(size), tensors)


def _damaged(rng: Random, data: bytes) -> bytes:
    header, tensors = _split(data)
    kind = rng.randrange(8)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    if kind == 0:
        place = rng.randrange(len(data))
        return data[:place] + rng.randbytes(rng.randrange(9)) + data[place + rng.randrange(9) :]
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        return struct.pack("<Q", rng.choice((0, 1, len(data), 2**32, 2**64 - 1))) + data[8:]
    if kind == 3:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif kind == 4:
        entry["shape"].insert(0, rng.choice(NUMBERS))
    elif kind == 5:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(("F32", "U8", None, []))
    elif kind == 6:
        header[rng.choice(NAMES)] = dict(entry)
    text = json.dumps(header).encode()
    if kind == 7:
        text = rng.choice((text[:-1] + b"," + text[1:], b"{" * 10**5, b'{"a":' * 10**4, b"{}"))
    return _joined(text, tensors + bytes(rng.choice((0, 0, 0, 4))))
