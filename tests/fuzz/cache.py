"""Files of findings, damaged in every way; intact findings must count, and be kept."""

import json
import os
import random
import warnings
from pathlib import Path
from unittest import mock

from emanet_triton.kernels import cache
from emanet_triton.kernels.cache import Cache

KEYS = [f"key {i}" for i in range(6)]
GARBAGE = (b"{", b"null", b"[" * 50_000, b"9" * 9000, b"\xff\xfe{\0", b'{"key": 1}', b'"a"', b"\r")


def attempt(seed: int, folder: Path) -> str:
    """Make file number ``seed`` and read it; "refused" if none of its findings may count."""
    rng = random.Random(seed)
    path = folder / "emanet_triton" / "cache.jsonl"
    path.parent.mkdir(parents=True)
    with (
        mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)),
        mock.patch.object(cache, "MOST_BYTES", 100_000),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        if rng.random() < 0.1:
            return _no_file(rng, path)
        content, expected = _lines(rng)
        path.write_bytes(content)
        if len(content) > cache.MOST_BYTES:
            expected = {}
        assert _kept() == expected
        Cache("cache.jsonl", "here").put("new", "finding")
        assert _kept() == expected
        assert Cache("cache.jsonl", "here").get("new") == "finding"
    return "refused" if content and not expected else "right"


def _kept() -> dict[str, str]:
    kept = Cache("cache.jsonl", "here")
    return {key: kept.get(key) for key in KEYS if kept.get(key) is not None}


def _no_file(rng: random.Random, path: Path) -> str:
    """Something else at the file's place stays as it is."""
    other = path.with_name("other")
    other.write_text("precious")
    make = (lambda: path.symlink_to(other), path.mkdir, lambda: os.mkfifo(path))
    rng.choice(make)()
    kind = path.lstat().st_mode
    kept = Cache("cache.jsonl", "here")
    kept.put("new", "finding")
    assert kept.get("new") == "finding"
    assert (path.lstat().st_mode, other.read_text()) == (kind, "precious")
    return "refused"


def _lines(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A file, and those of its findings that count for the environment "here"."""
    content, expected = b"", {}
    for _ in range(rng.randrange(12)):
        environment, key = rng.choice(("here", "there")), rng.choice(KEYS)
        finding = rng.choice(("cudnn", "é\n\x1b", "", "x" * 20_000))
        values = {"environment": environment, "key": key, "finding": finding}
        line = json.dumps(values, ensure_ascii=rng.random() < 0.5).encode()
        if rng.random() < 0.3:
            line = _damaged(rng, line)
        elif environment == "here":
            expected[key] = finding
        content += line + b"\n" * rng.choice((1, 1, 2))
    if content and rng.random() < 0.2:
        content += b'{"environment": "here", "ke'  # the writer was killed
    return content, expected


def _damaged(rng: random.Random, line: bytes) -> bytes:
    at = rng.randrange(1, len(line))
    return rng.choice(
        (
            line[:at],
            line[:at] + b"\xff" + line[at:],
            line[:at] + b"\0" + line[at + 1 :],
            line[:at] + b"\n" + line[at:],
            line + line,
            b"[" + line + b"]",
            rng.choice(GARBAGE),
        )
    )
