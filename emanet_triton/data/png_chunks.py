"""The chunks of a PNG file, and all rules of the specification that do not need the pixels.

Source: Portable Network Graphics (PNG) Specification, third edition, sections 5, 8 and 11.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PIXELS = 2**26  # 32 times a Cityscapes image; an image with more is refused
MAX_CHUNKS = 2**18  # a file of empty chunks would take minutes
_MAX_ROWS_BYTES = 2**28 + 2**20  # 8192 x 8192 pixels of four bytes; 16-bit images are smaller
_MAX_SIDE = 1_000_000  # pixels, the limit of libpng

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
_DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGBA: (8, 16),
}
# For each pass of an interlaced image: first column, first row, step of columns, step of rows.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


@dataclass(frozen=True)
class Header:
    """The content of IHDR: size in pixels, bits per sample, colour type, interlaced or not."""

    width: int
    height: int
    bit_depth: int
    color_type: int
    interlaced: bool

    def passes(self) -> Iterator[tuple[int, int]]:
        """Yield the number of rows, and the bytes of a row with its filter byte, of each pass."""
        bits = _CHANNELS[self.color_type] * self.bit_depth
        for left, top, step_x, step_y in _PASSES if self.interlaced else ((0, 0, 1, 1),):
            columns = len(range(left, self.width, step_x))
            rows = len(range(top, self.height, step_y))
            if columns and rows:
                yield rows, 1 + (columns * bits + 7) // 8

    def rows_bytes(self) -> int:
        """The number of bytes in the rows of all passes."""
        return sum(rows * row_bytes for rows, row_bytes in self.passes())


@dataclass(frozen=True)
class Chunks:
    """The contents of a file's chunks.

    Attributes:
        header: the content of IHDR.
        palette: RGB triples, empty if there is no palette.
        exif: the content of the first eXIf, empty if there is none; it may be damaged.
        pixel_data: the contents of all IDAT chunks, together one zlib stream.
    """

    header: Header
    palette: bytes
    exif: bytes
    pixel_data: list[memoryview]


def parse(data: bytes) -> Chunks:
    """Check every chunk of a file, but not the contents of ancillary chunks.

    Raises:
        ValueError: the file breaks a rule, or the image is absurdly large.
    """
    chunks = list(_chunks(data))
    header = _header(*chunks[0])
    names = [name for name, _ in chunks]
    _check_names(names)
    _check_order(names)
    palette = _first(chunks, b"PLTE")
    _check_palette(header, b"PLTE" in names, len(palette))
    if chunks[-1][1]:
        raise ValueError("its last chunk is not empty")
    pixel_data = [content for name, content in chunks if name == b"IDAT"]
    return Chunks(header, palette, _first(chunks, b"eXIf"), pixel_data)


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield type and content of each chunk from IHDR to IEND; ValueError at the first damage."""
    if not data.startswith(SIGNATURE):
        raise ValueError("it does not begin with the PNG signature" if data else "empty file")
    view, name, start, count = memoryview(data), b"", len(SIGNATURE), 0
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
        start, count = end + 4, count + 1
        if count > MAX_CHUNKS:
            raise ValueError(f"it has more than {MAX_CHUNKS} chunks")
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes follow its end")


def _first(chunks: list[tuple[bytes, memoryview]], wanted: bytes) -> bytes:
    """The content of the first chunk of this name, empty if there is none."""
    return next((bytes(content) for name, content in chunks if name == wanted), b"")


def _header(name: bytes, content: memoryview) -> Header:
    if name != b"IHDR" or len(content) != 13:
        raise ValueError("its first chunk is not a header")
    width, height, depth, color_type, *methods, interlace = struct.unpack(">IIBBBBB", content)
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"its header says {width}x{height}, at most {MAX_PIXELS} pixels are read")
    if max(width, height) > _MAX_SIDE:
        raise ValueError(f"its header says {width}x{height}, a side is at most {_MAX_SIDE} pixels")
    if depth not in _DEPTHS.get(color_type, ()):
        raise ValueError(f"its header says {depth} bits and colour type {color_type}")
    if methods != [0, 0] or interlace > 1:
        raise ValueError("its header says an unknown compression, filter or interlace method")
    header = Header(width, height, depth, color_type, bool(interlace))
    if (size := header.rows_bytes()) > _MAX_ROWS_BYTES:
        raise ValueError(f"its rows take {size} bytes, at most {_MAX_ROWS_BYTES} are read")
    return header


def _check_names(names: list[bytes]) -> None:
    for name in set(names):
        if not name.isalpha():
            raise ValueError("the name of a chunk is damaged")
        if name[:1].isupper() and name not in _CRITICAL:
            raise ValueError(f"it needs a chunk that is unknown, {name.decode()}")


def _check_order(names: list[bytes]) -> None:
    for name in (b"IHDR", b"PLTE"):
        if names.count(name) > 1:
            raise ValueError(f"it has several chunks {name.decode()}")
    if b"IDAT" not in names:
        raise ValueError("it holds no pixel data")
    first, count = names.index(b"IDAT"), names.count(b"IDAT")
    if set(names[first : first + count]) != {b"IDAT"}:
        raise ValueError("another chunk interrupts its pixel data")
    if b"PLTE" in names[first:]:
        raise ValueError("its palette follows its pixel data")


def _check_palette(header: Header, present: bool, size: int) -> None:
    if header.color_type == PALETTE and not present:
        raise ValueError("its palette is missing")
    if not present:
        return
    if header.color_type in (GREY, GREY_ALPHA):
        raise ValueError("it is grey and has a palette")
    most = 2**header.bit_depth if header.color_type == PALETTE else 256
    if size % 3 or not 0 < size // 3 <= most:
        raise ValueError(f"its palette of {size} bytes does not hold 1 to {most} colours")
