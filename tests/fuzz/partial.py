"""Partial results that are damaged or forged, and files of another kind."""

import copy
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from emanet_triton.eval.partial import PartialResult

SAMPLES = ["a", "b", "c"]
SETTINGS = {"samples": SAMPLES}
STAMPS = {name: [10, 20, 30, 40] for name in SAMPLES}
VERSIONS = {"torch": "2"}
_NUMBERS = -1, 2**70, 10**400, 1.5, 1e999, float("nan")
_ODD = (None, True, *_NUMBERS, "", "a", "\ud800", [], [[]], {}, {"a": 1})


def make() -> PartialResult:
    """A partial result of the samples, to be filled or read."""
    return PartialResult(SETTINGS, versions=VERSIONS, stamps=STAMPS)


def seal(content: dict[str, Any]) -> str:
    """The text of a file with the content and the checksum that fits."""
    text = json.dumps(content)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text})


def content_of(file: Path) -> Any:
    """The content of a file, without its checksum."""
    return json.loads(json.loads(file.read_text())["content"])


def attempt(seed: int, folder: Path) -> str:
    """Damage one of two files. The intact file must count; the damaged file as a whole or not."""
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / f"cache-{seed}")):
        return _attempt(random.Random(seed))


def _attempt(rng: random.Random) -> str:
    good, bad = make(), make()
    bad._file = bad._file.with_name("0-1.json")
    good.add(["c"], torch.full((1, 19, 19), 3), 1.0)
    good.write()
    for name in ("a", "b"):
        bad.add([name], torch.full((1, 19, 19), 5), 1.0)
    bad.write()
    forged = rng.choice(_DAMAGES)(rng, bad._file)
    reader = make()
    names, counts, seconds = reader.earlier()
    reader.discard()
    assert "c" in names
    assert 0 <= seconds < float("inf")
    if names == {"c"}:
        assert int(counts.sum()) == 3 * 361
        return "refused"
    # A forged file with a fitting checksum may hold other counts that are possible.
    assert names == set(SAMPLES) or forged
    assert forged or counts.tolist() == [[[13] * 19] * 19]
    assert int(counts.min()) >= 0
    return "right"


def _bytes(rng: random.Random, file: Path) -> bool:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return False


def _cut(rng: random.Random, file: Path) -> bool:
    data = file.read_bytes()
    begin, end = sorted(rng.choices(range(len(data) + 1), k=2))
    file.write_bytes(
        rng.choice((data[:begin], data[begin:], data[:begin] + data[end:], data + data))
    )
    return False


def _digits(rng: random.Random, file: Path) -> bool:
    text = file.read_text()
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    i = rng.choice(places)
    file.write_text(text[:i] + rng.choice("0123456789") + text[i + 1 :])
    return False


def _nested(rng: random.Random, file: Path) -> bool:
    depth = rng.choice((10, 10**3, 10**5))
    opening = rng.choice(("[", '{"settings":', '{"a":['))
    file.write_text(opening * depth)
    return False


def _forged(rng: random.Random, file: Path) -> bool:
    """Change a value somewhere, and write the checksum that fits."""
    content = content_of(file)
    for _ in range(rng.choice((1, 1, 3))):
        holder: Any = content
        key = rng.choice(list(content))
        while isinstance(holder[key], list | dict) and holder[key] and rng.random() < 0.8:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = copy.deepcopy(rng.choice((*_ODD, rng.randrange(2**40), holder[key])))
    file.write_text(seal(content))
    return True


def _odd(rng: random.Random, file: Path) -> bool:
    """Valid JSON that is no partial result."""
    file.write_text(json.dumps(rng.choice(_ODD)))
    return False


def _huge(rng: random.Random, file: Path) -> bool:
    with file.open("r+b") as sparse:
        sparse.truncate(rng.choice((5 * 10**9, 2**40)))
    return False


def _other_kind(rng: random.Random, file: Path) -> bool:
    whole = file.read_bytes()
    file.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    elif kind == 2:
        file.with_suffix(".elsewhere").write_bytes(whole)
        file.symlink_to(file.with_suffix(".elsewhere"))
    else:
        file.symlink_to(file)
    return False


_DAMAGES: tuple[Callable[[random.Random, Path], bool], ...] = (
    _bytes,
    _cut,
    _digits,
    _nested,
    _forged,
    _forged,
    _odd,
    _huge,
    _other_kind,
)
