"""Writes PNG files with all freedoms of the format, and damages them."""

import struct
import zlib
from functools import cache
from itertools import pairwise
from random import Random

import numpy as np

from tests.fuzz.png_reference import CHANNELS, DEPTHS, Png, columns_of, predictions

SIGNATURE = b"\x89PNG\r\n\x1a\n"
Chunks = list[tuple[bytes, bytes]]
ANCILLARY = (b"tEXt", b"zTXt", b"iTXt", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT")
ANCILLARY += (b"eXIf", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"cICP", b"mDCV", b"cLLI")
ANCILLARY += (b"acTL", b"fcTL", b"fdAT", b"vpAg", b"aaaa")


def make(rng: Random) -> tuple[bytes, np.ndarray | None]:
    """The bytes of a file; and its samples [H, W, C] if nothing in it is damaged."""
    where = rng.choices(("nowhere", "rows", "stream", "chunks", "bytes"), (4, 2, 3, 6, 1))[0]
    png, stored = _random_png(rng)
    rows = _filtered_rows(rng, png, stored)
    if where == "rows":
        rows = _damaged_rows(rng, rows)
    png.stream = _compressed(rng, rows)
    if where == "stream":
        png.stream = _damaged_stream(rng, png.stream)
    chunks = _chunks(rng, png)
    if where == "chunks":
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(CHUNK_DAMAGES)(rng, chunks)
    data = SIGNATURE + b"".join(_chunk(*each) for each in chunks)
    if where == "bytes":
        data = rng.choice(BYTE_DAMAGES)(rng, data)
    return data, stored if where == "nowhere" else None


def _random_png(rng: Random) -> tuple[Png, np.ndarray]:
    width, height = rng.choice(
        ((rng.randint(1, 20), rng.randint(1, 20)), (rng.randint(1, 400), 1), (1, 300), (150, 160))
        if rng.random() < 0.1
        else ((rng.randint(1, 20), rng.randint(1, 20)),)
    )
    color_type = rng.choice(sorted(DEPTHS))
    depth = rng.choice(DEPTHS[color_type])
    most = 2**depth
    palette = []
    if color_type == 3 or (color_type in (2, 6) and rng.random() < 0.1):
        count = rng.randint(1, 2**depth if color_type == 3 else 256)
        palette = [rng.randbytes(3) for _ in range(count)]
        if color_type == 3 and rng.random() < 0.8:
            most = count
    stored = np.random.default_rng(rng.getrandbits(32)).integers(
        0, most, (height, width, CHANNELS[color_type]), np.uint16
    )
    return Png(width, height, depth, color_type, rng.random() < 0.4, palette, b""), stored


def _filtered_rows(rng: Random, png: Png, stored: np.ndarray) -> bytes:
    """The rows of all passes, with random filters: section 9 in the direction of a writer."""
    bits = CHANNELS[png.color_type] * png.depth
    unit, out = max(1, bits // 8), bytearray()
    kinds = rng.choice(((0, 1, 2, 3, 4), (rng.randint(0, 4),)))
    for number in range(1, 8) if png.interlaced else [0]:
        previous = None
        for y in range(png.height):
            if xs := columns_of(png, number, y):
                row = _packed(rng, stored[y, xs].ravel().tolist(), png.depth)
                above, kind = previous or bytes(len(row)), rng.choice(kinds)
                out.append(kind)
                for i, byte in enumerate(row):
                    left = row[i - unit] if i >= unit else 0
                    corner = above[i - unit] if i >= unit else 0
                    out.append((byte - predictions(left, above[i], corner)[kind]) % 256)
                previous = row
    return bytes(out)


def _packed(rng: Random, values: list[int], depth: int) -> bytes:
    """The samples of a row, the unused bits at its end at random."""
    if depth == 16:
        return struct.pack(f">{len(values)}H", *values)
    bits = "".join(f"{value:0{depth}b}" for value in values)
    bits += "".join(rng.choice("01") for _ in range(-len(bits) % 8))
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def _compressed(rng: Random, rows: bytes) -> bytes:
    """A zlib stream of any level, window and strategy, maybe with empty blocks between."""
    level, window = rng.choice((0, 1, 6, 9)), rng.choice((9, 12, 15, 15))
    compressor = zlib.compressobj(level, zlib.DEFLATED, window, 9, rng.choice((0, 1, 2, 3, 4)))
    cut = rng.randint(0, len(rows))
    flush = rng.choice((zlib.Z_NO_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH))
    stream = compressor.compress(rows[:cut]) + compressor.flush(flush)
    return stream + compressor.compress(rows[cut:]) + compressor.flush()


def _damaged_rows(rng: Random, rows: bytes) -> bytes:
    kind = rng.choice(("cut", "longer", "filter", "byte", "empty"))
    if kind == "cut":
        return rows[: -rng.choice((1, 2, rng.randint(1, len(rows))))]
    if kind == "longer":
        return rows + rng.randbytes(rng.choice((1, 2, 100, 70_000)))
    if kind == "filter":
        return bytes([rng.choice((5, 6, 64, 255))]) + rows[1:]
    if kind == "byte":
        at = rng.randrange(len(rows))
        return rows[:at] + rng.randbytes(1) + rows[at + 1 :]
    return b""


def _damaged_stream(rng: Random, stream: bytes) -> bytes:
    kinds = ("cut", "tail", "second", "byte", "checksum", "start", "dictionary", "raw", "bomb")
    kind = rng.choice(kinds)
    at = rng.randrange(len(stream))
    if kind == "cut":
        return stream[: -rng.choice((1, 4, 5, at + 1))]
    if kind == "tail":
        return stream + rng.choice((b"\0", rng.randbytes(30)))
    if kind == "second":
        return stream + stream
    if kind == "byte":
        return stream[:at] + rng.randbytes(1) + stream[at + 1 :]
    if kind == "checksum":
        return stream[:-4] + rng.choice((bytes(4), rng.randbytes(4)))
    if kind == "start":  # another method, window or check of both
        first = rng.choice((0x78, 0x88, 0x79, 0x08, rng.getrandbits(8)))
        return bytes([first, rng.choice((-first * 256 % 31, rng.getrandbits(8)))]) + stream[2:]
    if kind == "dictionary":
        second = 0x20 | (-(0x78 * 256 + 0x20) % 31)
        return bytes([0x78, second]) + rng.randbytes(4) + stream[2:]
    if kind == "raw":
        return stream[2:-4]
    return _bomb()


@cache
def _bomb() -> bytes:
    """A stream of 128 MiB of zeros."""
    compressor = zlib.compressobj(1)
    blocks = [compressor.compress(bytes(2**20)) for _ in range(128)]
    return b"".join([*blocks, compressor.flush()])


def _chunks(rng: Random, png: Png) -> Chunks:
    """The chunks of a valid file, with ancillary ones of any content wherever they may stand."""
    header = struct.pack(
        ">IIBBBBB", png.width, png.height, png.depth, png.color_type, 0, 0, png.interlaced
    )
    palette = [(b"PLTE", b"".join(png.palette))] if png.palette else []
    before, after = [(b"IHDR", header), *palette], [(b"IEND", b"")]
    if rng.random() < 0.3:
        _animate(rng, png, before, after)
    for _ in range(rng.choice((0, 0, 1, 3))):
        part = rng.choice((before, after))
        part.insert(rng.randint(int(part is before), len(part) - (part is after)), _ancillary(rng))
    return before + _split(rng, png.stream) + after


def _split(rng: Random, stream: bytes) -> Chunks:
    """The stream in IDAT chunks of any size, empty ones too."""
    cuts = [rng.randint(0, len(stream)) for _ in range(rng.choice((0, 0, 1, 5, 40)))]
    edges = [0, *sorted(cuts), len(stream)]
    return [(b"IDAT", stream[a:b]) for a, b in pairwise(edges)]


def _ancillary(rng: Random) -> tuple[bytes, bytes]:
    """An ancillary chunk, its content valid by chance only."""
    name = rng.choice(ANCILLARY)
    order, start = rng.choice(((">", b"MM\0*"), ("<", b"II*\0")))
    orientation = start + struct.pack(
        f"{order}IHHHIHHI", 8, 1, 0x112, 3, 1, rng.choice((0, 9, *range(1, 9))), 0, 0
    )
    lengths = (0, 1, 2, 4, 6, 8, 26, 32, 256, 700)
    return name, rng.choice((orientation, rng.randbytes(rng.choice(lengths)), bytes(26)))


def _animate(rng: Random, png: Png, before: Chunks, after: Chunks) -> None:
    """Make it an animated PNG of a second frame; some of its parts may be missing."""

    def control(number: int) -> tuple[bytes, bytes]:
        ends = (png.width, png.height, 0, 0, 1, 10, rng.randint(0, 2), rng.randint(0, 1))
        return b"fcTL", struct.pack(">IIIIIHHBB", number, *ends)

    frame = struct.pack(">I", 2) + zlib.compress(bytes(len(png.stream) + 100))
    parts = [
        (before, (b"acTL", struct.pack(">II", rng.randint(0, 3), 0))),
        (before, control(0)),
        (after, control(1)),
        (after, (b"fdAT", frame)),
    ]
    for part, chunk in parts:
        if rng.random() < 0.9:
            part.insert(len(part) - (part is after), chunk)


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def _drop(rng: Random, chunks: Chunks) -> None:
    if chunks:
        del chunks[rng.randrange(len(chunks))]


def _double(rng: Random, chunks: Chunks) -> None:
    if chunks:
        chunks.insert(rng.randint(0, len(chunks)), rng.choice(chunks))


def _swap(rng: Random, chunks: Chunks) -> None:
    if chunks:
        i, j = rng.randrange(len(chunks)), rng.randrange(len(chunks))
        chunks[i], chunks[j] = chunks[j], chunks[i]


def _insert(rng: Random, chunks: Chunks) -> None:
    names = (*ANCILLARY, b"IHDR", b"PLTE", b"IDAT", b"IEND", b"JHDR", b"CgBI", b"ab1d", b"\0\0\0\0")
    content = rng.randbytes(rng.choice((0, 3, 13, 30)))
    chunks.insert(rng.randint(0, len(chunks)), (rng.choice(names), content))


def _splice(rng: Random, chunks: Chunks) -> None:
    """Exchange a chunk for one of the same name of another file."""
    other, stored = _random_png(rng)
    other.stream = _compressed(rng, _filtered_rows(rng, other, stored))
    name, content = rng.choice(_chunks(rng, other))
    places = [i for i, chunk in enumerate(chunks) if chunk[0] == name]
    if places:
        chunks[rng.choice(places)] = name, content


def _rename(rng: Random, chunks: Chunks) -> None:
    if chunks:
        i = rng.randrange(len(chunks))
        name = bytearray(chunks[i][0])
        name[rng.randrange(4)] ^= rng.choice((32, 32, 1 << rng.randrange(8)))
        chunks[i] = bytes(name), chunks[i][1]


def _alter(rng: Random, chunks: Chunks) -> None:
    """Change, cut or lengthen a content; its checksum is right again."""
    if chunks:
        i = rng.randrange(len(chunks))
        content = bytearray(chunks[i][1])
        for _ in range(rng.choice((1, 1, 4))):
            if content:
                content[rng.randrange(len(content))] = rng.getrandbits(8)
        cut = rng.choice((None, None, len(content) // 2, len(content) - 1))
        chunks[i] = chunks[i][0], bytes(content[:cut]) + rng.choice((b"", b"", b"\0"))


def _alter_header(rng: Random, chunks: Chunks) -> None:
    for i, (name, content) in enumerate(chunks):
        if name == b"IHDR" and len(content) == 13:
            fields = list(struct.unpack(">IIBBBBB", content))
            j = rng.randrange(7)
            sizes = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 8192, 2**16)
            near = ((fields[j] + 1) % 2**32, max(0, fields[j] - 1))
            kinds = (0, 1, 2, 3, 4, 5, 6, 8, 16, 255)
            fields[j] = rng.choice(sizes + near if j < 2 else kinds)
            chunks[i] = name, struct.pack(">IIBBBBB", *fields)


def _alter_palette(rng: Random, chunks: Chunks) -> None:
    """Write another number of colours: none, too many, or a part of one."""
    size = rng.choice((0, 1, 2, 3, 6, 12, 48, 51, 767, 768, 769, 771))
    for i, (name, _) in enumerate(chunks):
        if name == b"PLTE":
            chunks[i] = name, rng.randbytes(size)
            return
    chunks.insert(min(1, len(chunks)), (b"PLTE", rng.randbytes(size)))


CHUNK_DAMAGES = (
    _drop,
    _double,
    _swap,
    _insert,
    _splice,
    _rename,
    _alter,
    _alter_header,
    _alter_header,
    _alter_palette,
)


def _flip(rng: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _end_early(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - 1, len(data) - 12, 8))]


def _go_on(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\0", rng.randbytes(20), _chunk(b"IEND", b""), data))


def _lose_bytes(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randint(1, 20) :]


BYTE_DAMAGES = (_flip, _end_early, _go_on, _lose_bytes)
