"""The rows of a PNG file: inflated from its stream, and put into a file for any decoder."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from emanet_triton.data.png_chunks import SIGNATURE, Header

_FILTERS = 5  # types 0 to 4
_BLOCK = 2**16 - 1  # bytes of a deflate block that is stored without compression


def inflate(pixel_data: list[memoryview], header: Header) -> bytes:
    """Inflate the rows of all passes; each row follows its filter byte.

    Raises:
        ValueError: the stream does not hold exactly the rows of ``header``, bytes follow the
            stream, or a row has an unknown filter.
        zlib.error: the stream is damaged.
    """
    size = header.rows_bytes()
    inflater, parts, left = zlib.decompressobj(), [], size + 1
    for content in filter(None, pixel_data):
        if inflater.eof:
            raise ValueError("bytes follow the stream of its pixel data")
        parts.append(inflater.decompress(content, left))
        left -= len(parts[-1])
        if not left:
            raise ValueError(f"its pixel data is longer than {size} bytes")
    if inflater.unused_data:
        raise ValueError("bytes follow the stream of its pixel data")
    if left > 1:
        raise ValueError(f"its pixel data ends after {size + 1 - left} of {size} bytes")
    if not inflater.eof:
        raise ValueError("the stream of its pixel data has no end")
    rows = b"".join(parts)
    _check_filters(rows, header)
    return rows


def bare_png(header: Header, rows: bytes) -> np.ndarray:
    """A PNG file of these rows, uint8 [bytes], uncompressed because they were inflated before."""
    method = 0  # the only method of compression, and the only method of filtering
    sizes = header.width, header.height
    kind = header.bit_depth, header.color_type, method, method, header.interlaced
    parts = [
        SIGNATURE,
        *_chunk(b"IHDR", struct.pack(">IIBBBBB", *sizes, *kind)),
        *_chunk(b"IDAT", *_stored(rows)),
        *_chunk(b"IEND"),
    ]
    return np.frombuffer(b"".join(parts), np.uint8)


def _check_filters(rows: bytes, header: Header) -> None:
    values, start = np.frombuffer(rows, np.uint8), 0
    for count, row_bytes in header.passes():
        end = start + count * row_bytes
        if (largest := values[start:end:row_bytes].max()) >= _FILTERS:
            raise ValueError(f"a row has the unknown filter {largest}")
        start = end


def _chunk(name: bytes, *contents: bytes | memoryview) -> list[bytes | memoryview]:
    """The parts of a chunk, whose content may come in several pieces."""
    checksum = zlib.crc32(name)
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    size = sum(map(len, contents))
    return [struct.pack(">I", size), name, *contents, struct.pack(">I", checksum)]


def _stored(rows: bytes) -> Iterator[bytes | memoryview]:
    """The pieces of a zlib stream with uncompressed blocks (RFC 1950 and 1951)."""
    view = memoryview(rows)
    yield b"\x78\x01"
    for start in range(0, len(rows), _BLOCK):
        block = view[start : start + _BLOCK]
        last = start + _BLOCK >= len(rows)
        yield struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF)
        yield block
    yield struct.pack(">I", zlib.adler32(rows))
