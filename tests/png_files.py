"""PNG files for tests: an image and a label of 40x24 pixels, and how they are put together."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emanet_triton.data.png import png_size, read_image, read_label_png
from emanet_triton.errors import InputError

READERS = (png_size, read_image, read_label_png)
RNG = np.random.RandomState(0)
RGB = RNG.randint(0, 256, (24, 40, 3)).astype(np.uint8)
IDS = RNG.randint(0, 34, (24, 40)).astype(np.uint8)
ROWS = b"".join(b"\0" + row.tobytes() for row in RGB)
ID_ROWS = b"".join(b"\0" + row.tobytes() for row in IDS)


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def header(
    width: int = 40,
    height: int = 24,
    depth: int = 8,
    color_type: int = 2,
    *,
    methods: bytes = b"\0\0\0",
) -> bytes:
    """``methods``: of compression, filters and interlacing."""
    return chunk(b"IHDR", struct.pack(">IIBB", width, height, depth, color_type) + methods)


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def exif_of(orientation: int, order: str = "<", tag: int = 0x112) -> bytes:
    """EXIF data with one tag; ``order`` is that of ``struct``."""
    start = b"MM\0*" if order == ">" else b"II*\0"
    return start + struct.pack(f"{order}IHHHIHHI", 8, 1, tag, 3, 1, orientation, 0, 0)


def palette_image(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(RNG.randint(0, 256, 768).astype(np.uint8).tobytes())
    return image


def pixels(rows: bytes) -> bytes:
    return chunk(b"IDAT", zlib.compress(rows))


STREAM = zlib.compress(ROWS)
IDAT = chunk(b"IDAT", STREAM)
INTACT = png(header(), chunk(b"tEXt", b"Comment\0ancillary"), IDAT)


def refused(path: Path, reason: str, *readers) -> None:
    for reader in readers or READERS:
        with pytest.raises(InputError) as caught:
            reader(path)
        assert str(caught.value) == (
            f"{path}: not a readable PNG ({reason}); expected an intact PNG file"
        )
