"""JPEG, WebP, BMP and TIFF files of many forms, whole and damaged; ``png`` is a kind of its own.

A file that is read must hold what OpenCV reads from the same bytes. A whole file must be read, if
OpenCV reads it, and a JPEG that lacks its end must be refused. Nothing may be printed.
"""

import io
import os
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from emanet_triton.data.picture import picture_kind, read_picture
from emanet_triton.errors import InputError

Result = TypeVar("Result")
MODES = {
    "JPEG": ("RGB", "RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "L", "P", "1", "RGBA"),
    "TIFF": ("RGB", "L", "P", "1", "RGBA", "CMYK", "I;16", "LA"),
}
COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
SIZES = (0, 1, 2, 255, 256, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1)


def attempt(seed: int, folder: Path) -> str:
    rng = Random(seed)
    kind = rng.choice(sorted(MODES))
    data, whole = _file(rng, kind), rng.random() < 0.3
    cut = not whole and rng.random() < 0.2
    if cut:
        data = data[: rng.randrange(len(data))]
    elif not whole:
        for _ in range(rng.choice((1, 1, 2, 5))):
            data = rng.choice(DAMAGES)(rng, data)
    path = folder / "file"
    path.write_bytes(data)
    expected, _ = _printed(partial(_opencv, data))
    found, printed = _printed(partial(_read, path))
    assert not printed, printed
    if isinstance(found, InputError):
        assert not whole or expected is None, f"whole, but refused: {found}"
        return "refused"
    assert not (cut and picture_kind(data) == "JPEG"), "cut, but read"
    np.testing.assert_array_equal(found, expected)
    return "right"


def _read(path: Path) -> np.ndarray | InputError:
    try:
        return read_picture(path)
    except InputError as error:
        return error


def _opencv(data: bytes) -> np.ndarray | None:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return image if image is None else image[..., ::-1]


def _printed(read: Callable[[], Result]) -> tuple[Result, bytes]:
    """The result, and what was printed on the standard error, by C libraries as well."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of Python
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            result = read()
        finally:
            os.dup2(before, 2)
            os.close(before)
        file.seek(0)
        return result, file.read()


def _file(rng: Random, kind: str) -> bytes:
    mode = rng.choice(MODES[kind])
    stream = io.BytesIO()
    _picture(rng, mode).save(stream, kind, **_options(rng, kind, mode))
    return stream.getvalue()


def _picture(rng: Random, mode: str) -> Image.Image:
    """Noise that is smooth, so that a compressed file is not all noise."""
    height, width = (rng.choice((rng.randint(1, 70), rng.randint(1, 9), 16)) for _ in range(2))
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (4, 5, 4), np.uint8)
    pixels = cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 256 + pixels[..., 1])
    if mode in ("RGBA", "LA"):
        return Image.fromarray(pixels, "RGBA").convert(mode)
    return Image.fromarray(pixels[..., :3]).convert(mode)


def _options(rng: Random, kind: str, mode: str) -> dict:
    exif = Image.Exif()
    if rng.random() < 0.5:
        exif[0x112] = rng.randint(1, 8)
    if kind == "JPEG":
        restart = {"restart_marker_rows": 1} if rng.random() < 0.3 else {}
        return {
            "quality": rng.choice((5, 75, 95)),
            "progressive": rng.random() < 0.4,
            "exif": exif.tobytes(),
            **restart,
        }
    if kind == "WEBP":
        frames = [_picture(rng, mode) for _ in range(rng.choice((0, 0, 2)))]
        return {
            "lossless": rng.random() < 0.5,
            "quality": rng.choice((1, 80)),
            "exif": exif.tobytes(),
            "save_all": bool(frames) and frames[0].size == frames[-1].size,
        }
    if kind == "TIFF":
        compression = rng.choice(COMPRESSIONS)
        if compression == "jpeg" and mode not in ("RGB", "L"):
            compression = "raw"
        return {"compression": compression, "exif": exif.tobytes()}
    return {}


def _flip(rng: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    if damaged:
        at = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 200))))
        damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _number(rng: Random, data: bytes) -> bytes:
    """Write another number over two or four bytes, maybe a size, a count or an offset."""
    at = rng.choice((rng.randrange(len(data) + 1), rng.randrange(200), len(data) - 60))
    form = rng.choice(("<H", ">H", "<I", ">I"))
    number = struct.pack(form, rng.choice(SIZES) & (2 ** (8 * struct.calcsize(form)) - 1))
    at = max(0, at)
    return data[:at] + number + data[at + len(number) :]


def _lose(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 2, 20, len(data) // 4)) :]


def _gain(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    new = rng.choice((bytes(rng.randint(1, 40)), rng.randbytes(rng.randint(1, 40)), data[:at]))
    return data[:at] + new + data[at:]


def _zero(rng: Random, data: bytes) -> bytes:
    """A block of zeros, as a disk leaves it."""
    at, size = rng.randrange(len(data) + 1), rng.choice((4, 64, 512))
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def _go_on(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(20), data))


def _other_start(rng: Random, data: bytes) -> bytes:
    starts = (b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"<html>")
    start = rng.choice(starts)
    return start + data[len(start) :]


DAMAGES = (_flip, _flip, _flip, _number, _number, _lose, _gain, _zero, _go_on, _other_start)
