"""Reading and writing PNG files: damage is caught before any decoder sees the bytes."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from emanet_triton.errors import InputError
from emanet_triton.files import write_whole

MAX_PIXELS = 2**26  # 32 times a Cityscapes image; a header that promises more is not believed

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # PNG colour types
_READ_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION  # pixels stay where labels are


@dataclass(frozen=True)
class _Header:
    """What IHDR says: size in pixels, bits per sample, PNG colour type."""

    height: int
    width: int
    bit_depth: int
    color_type: int


def read_image(path: Path) -> np.ndarray:
    """Decode a colour, palette, grey or RGBA PNG (alpha is dropped, 16 bits become 8).

    Returns:
        uint8 RGB [H, W, 3]; the pixels OpenCV gives, as in the published evaluation.

    Raises:
        InputError: the file is missing, no PNG, damaged anywhere or absurdly large.
    """
    data, header = _load(path)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _READ_FLAGS)
    except cv2.error as error:
        raise _unreadable(path, str(error)) from error
    if image is None:
        raise _unreadable(path, "the pixel data does not decode")
    if image.shape != (header.height, header.width, 3):
        raise _unreadable(path, f"it does not decode to {header.width}x{header.height} pixels")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_label_png(path: Path) -> np.ndarray:
    """Decode a label PNG to the ids it stores: grey values or palette indices.

    Returns:
        uint8 [H, W], or uint16 for a 16-bit file.

    Raises:
        InputError: as ``read_image``, and for colours or grey of fewer than 8 bits, whose
            values are not ids.
    """
    data, header = _load(path)
    grey = header.color_type == _GREY and header.bit_depth >= 8
    if not grey and header.color_type != _PALETTE:
        kind = "grey" if header.color_type == _GREY else "colour or alpha"
        raise InputError(
            f"{path}: not a label PNG ({header.bit_depth}-bit {kind}); expected one id a pixel, "
            "as grey of 8 or 16 bits or as palette indices"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            ids = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    return ids.astype(np.uint16 if header.bit_depth == 16 else np.uint8)


def png_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of a PNG whose every chunk is intact.

    Raises:
        InputError: the file is missing, no PNG, damaged anywhere or absurdly large.
    """
    _, header = _load(path)
    return header.height, header.width


def write_png(path: Path, array: np.ndarray) -> None:
    """Write uint8 grey [H, W] or RGB [H, W, 3]; a reader never sees a half-written file.

    Raises:
        InputError: the folder is missing or the file cannot be written.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.shape[2:] == (3,)):
        raise ValueError(f"expected uint8 [H, W] or [H, W, 3], got {array.dtype} {array.shape}")
    pixels = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".png", pixels)
    try:
        write_whole(path, encoded.tobytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def _load(path: Path) -> tuple[bytes, _Header]:
    """The file's bytes, read once, and its header, after every chunk has been checked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    try:
        return data, _check(data)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error


def _check(data: bytes) -> _Header:
    """The header of an intact PNG (PNG specification, sections 5 and 11); else ValueError."""
    chunks = _chunks(data)
    header = _parse_header(*next(chunks))
    if b"IDAT" not in {name for name, _ in chunks}:
        raise ValueError("it holds no pixel data")
    return header


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(type, content) of each chunk from IHDR to IEND; ValueError at the first damage."""
    if not data.startswith(_SIGNATURE):
        raise ValueError("it does not begin with the PNG signature" if data else "empty file")
    view, name, start = memoryview(data), b"", len(_SIGNATURE)
    while name != b"IEND":
        if len(data) < start + 12:
            raise ValueError("it is truncated")
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 8 + length
        if len(data) < end + 4:
            raise ValueError("it is truncated, or a chunk's length is damaged")
        if zlib.crc32(view[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"checksum error in the chunk at byte {start}")
        yield name, view[start + 8 : end]
        start = end + 4
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes follow its end")


def _parse_header(name: bytes, content: memoryview) -> _Header:
    if name != b"IHDR" or len(content) != 13:
        raise ValueError("its first chunk is not a header")
    width, height, bit_depth, color_type = struct.unpack_from(">IIBB", content)
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"its header says {width}x{height}, at most {MAX_PIXELS} pixels are read")
    return _Header(height, width, bit_depth, color_type)


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not a readable PNG ({reason}); expected an intact PNG file")
