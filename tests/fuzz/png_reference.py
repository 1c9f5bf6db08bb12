"""A slow PNG decoder that follows the specification and refuses every broken rule.

It shares no code with the package, OpenCV or Pillow. Source: Portable Network Graphics (PNG)
Specification, third edition; the numbers below are its sections. The content of eXIf is TIFF 6.0.
"""

import zlib
from dataclasses import dataclass

import numpy as np

MAX_PIXELS, MAX_SIDE = 2**26, 1_000_000  # limits of the package, not of the specification
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # 11.2.1
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# 8.2: the pass of each pixel of a square of 8 by 8.
ADAM7 = (
    "16462646",
    "77777777",
    "56565656",
    "77777777",
    "36463646",
    "77777777",
    "56565656",
    "77777777",
)


class BrokenRuleError(Exception):
    """The file is not a valid PNG, or a pixel has no colour."""


@dataclass
class Png:
    """A file whose chunks are valid; ``stream`` is the pixel data, not yet checked.

    ``turned`` is the orientation, 1 to 8.
    """

    width: int
    height: int
    depth: int
    color_type: int
    interlaced: int
    palette: list[bytes]
    stream: bytes
    turned: int = 1


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise BrokenRuleError(rule)


def parse(data: bytes) -> Png:
    """Check every rule about the chunks."""
    require(data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10]), "5.2 signature")
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        require(length < 2**31 and len(checksum) == 4, "5.3 whole chunks")
        require(zlib.crc32(body) == int.from_bytes(checksum, "big"), "5.5 checksum")
        chunks.append((body[:4], body[4:]))
        at += 12 + length
    names = [name for name, _ in chunks]
    for name in names:
        require(all(65 <= byte <= 90 or 97 <= byte <= 122 for byte in name), "5.3 letters")
        known = name in (b"IHDR", b"PLTE", b"IDAT", b"IEND")
        require(known or name[0] >= 97, "5.4 unknown critical chunk")
    require(names[:1] == [b"IHDR"] and names.count(b"IHDR") == 1, "5.6 IHDR")
    require(names[-1:] == [b"IEND"] and names.count(b"IEND") == 1, "5.6 IEND")
    require(chunks[-1][1] == b"", "11.2.4 empty IEND")
    where = [i for i, name in enumerate(names) if name == b"IDAT"]
    require(bool(where), "5.6 IDAT")
    require(where == list(range(where[0], where[0] + len(where))), "5.6 consecutive IDAT")
    header = chunks[0][1]
    require(len(header) == 13, "11.2.1 length")
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    depth, color_type, compression, filtering, interlaced = header[8:]
    require(0 < width < 2**31 and 0 < height < 2**31, "11.2.1 size")
    require(width * height <= MAX_PIXELS and max(width, height) <= MAX_SIDE, "the package's limits")
    require(depth in DEPTHS.get(color_type, ()), "11.2.1 depth and colour type")
    require(compression == filtering == 0 and interlaced in (0, 1), "11.2.1 methods")
    palette = [content for name, content in chunks if name == b"PLTE"]
    require(len(palette) <= 1, "5.6 one PLTE")
    require(bool(palette) or color_type != 3, "11.2.2 PLTE is needed")
    require(not palette or color_type not in (0, 4), "11.2.2 grey has no PLTE")
    if palette:
        require(names.index(b"PLTE") < where[0], "5.6 PLTE before IDAT")
        most = 2**depth if color_type == 3 else 256
        require(len(palette[0]) % 3 == 0, "11.2.2 triples")
        require(1 <= len(palette[0]) // 3 <= most, "11.2.2 number of colours")
    colors = [palette[0][i : i + 3] for i in range(0, len(palette[0]), 3)] if palette else []
    stream = b"".join(content for name, content in chunks if name == b"IDAT")
    exif = next((content for name, content in chunks if name == b"eXIf"), b"")
    return Png(width, height, depth, color_type, interlaced, colors, stream, _orientation(exif))


def _orientation(exif: bytes) -> int:
    """11.3.4.5: the value of the first tag 274 in the first directory; 1 if there is none."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if not order or len(exif) < 8:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    start = number(4, 4)
    entries = range(start + 2, start + 2 + 12 * number(start, 2), 12)
    for at in entries if start + 2 <= len(exif) else ():
        if at + 12 > len(exif):
            break
        if number(at, 2) == 274:
            found = number(at + 8, 2)
            return found if found in range(1, 9) else 1
    return 1


def size(png: Png) -> tuple[int, int]:
    """(height, width) of ``image``."""
    return (png.width, png.height) if png.turned > 4 else (png.height, png.width)


def samples(png: Png) -> np.ndarray:
    """uint16 [H, W, C], as they are stored."""
    rows = list(_inflated_rows(png))
    out = np.zeros((png.height, png.width, CHANNELS[png.color_type]), np.uint16)
    for y, xs, row in rows:
        count = len(xs) * out.shape[2]
        out[y, xs] = np.reshape(_unpacked(row, png.depth)[:count], (len(xs), -1))
    return out


def image(png: Png) -> np.ndarray:
    """uint8 RGB [H, W, 3]: alpha dropped, the upper byte of 16 bits, grey over the full range.

    It is turned: the stored first row is the top, bottom, left or right of the image.
    """
    stored = _colors(png)
    turns = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (3, 0), 7: (3, 1), 8: (1, 0)}
    quarters, mirrored = turns[png.turned]
    turned = np.rot90(stored, quarters)
    if not mirrored:
        return turned
    return turned[::-1] if png.turned in (5, 7) else turned[:, ::-1]


def _colors(png: Png) -> np.ndarray:
    stored = samples(png)
    if png.color_type == 3:
        require(int(stored.max()) < len(png.palette), "11.2.2 index beyond the palette")
        return np.array([[list(png.palette[i]) for i in row] for row in stored[..., 0]], np.uint8)
    color = stored[..., :3] if png.color_type in (2, 6) else stored[..., [0, 0, 0]]
    if png.depth == 16:
        return (color >> 8).astype(np.uint8)
    return (color * (255 // (2**png.depth - 1))).astype(np.uint8)


def label(png: Png) -> np.ndarray:
    """uint8 or uint16 [H, W]: grey of 8 or 16 bits, or palette indices."""
    require(png.color_type == 3 or (png.color_type == 0 and png.depth >= 8), "no label")
    return samples(png)[..., 0].astype(np.uint16 if png.depth == 16 else np.uint8)


def _inflated_rows(png: Png):
    """(row of the image, its columns, unfiltered bytes) of each row of each pass."""
    bits = CHANNELS[png.color_type] * png.depth
    most = png.width * png.height * bits // 8 + 4 * png.height + 100  # with filters and padding
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(png.stream, most)
    except zlib.error as error:
        raise BrokenRuleError(f"10.1 zlib: {error}") from error
    require(inflater.eof, "10.1 the stream ends early, or is far too long")
    require(not inflater.unused_data, "10.1 something follows the stream")
    require(png.width * png.height * bits <= 8 * len(data), "10.1 pixels are missing")
    at = 0
    for number in range(1, 8) if png.interlaced else [0]:
        previous = None
        for y in range(png.height):
            xs = columns_of(png, number, y)
            if not xs:
                continue
            size = (len(xs) * bits + 7) // 8
            require(at + 1 + size <= len(data), "10.1 rows are missing")
            row = bytearray(data[at + 1 : at + 1 + size])
            _unfilter(data[at], row, previous or bytes(size), max(1, bits // 8))
            yield y, xs, row
            previous, at = row, at + 1 + size
    require(at == len(data), "10.1 rows too many")


def columns_of(png: Png, number: int, y: int) -> list[int]:
    if not number:
        return list(range(png.width))
    return [x for x in range(png.width) if ADAM7[y % 8][x % 8] == str(number)]


def _unfilter(kind: int, row: bytearray, previous: bytes, unit: int) -> None:
    """9.2, in place; ``unit`` is the number of bytes of a whole pixel."""
    require(kind <= 4, "9.2 filter type")
    for i in range(len(row)):
        a = row[i - unit] if i >= unit else 0
        b = previous[i]
        c = previous[i - unit] if i >= unit else 0
        row[i] = (row[i] + predictions(a, b, c)[kind]) % 256


def predictions(a: int, b: int, c: int) -> tuple[int, int, int, int, int]:
    """Each filter type's prediction of a byte, from the bytes to the left, above and above left."""
    p = a + b - c
    paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]  # 9.4
    return 0, a, b, (a + b) // 2, paeth


def _unpacked(row: bytes, depth: int) -> list[int]:
    """7.2: the samples of a row. The last byte may hold more samples than the row has."""
    if depth == 16:
        return [row[i] * 256 + row[i + 1] for i in range(0, len(row), 2)]
    shifts = range(8 - depth, -1, -depth)
    return [(byte >> shift) % 2**depth for byte in row for shift in shifts]
