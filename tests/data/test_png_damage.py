"""Damaged PNG files, and files that only look like PNG, are refused with the reason."""

import os
import socket
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from png_files import (
    ID_ROWS,
    IDAT,
    IDS,
    INTACT,
    READERS,
    RGB,
    STREAM,
    chunk,
    encoded,
    header,
    palette_image,
    pixels,
    png,
    refused,
)

from emanet_triton.data.png import png_size, read_image, read_label_png
from emanet_triton.data.png_chunks import MAX_CHUNKS
from emanet_triton.data.reading import MAX_FILE_BYTES
from emanet_triton.errors import InputError


@pytest.mark.parametrize(
    "intact",
    [INTACT, encoded(Image.fromarray(IDS)), encoded(palette_image(IDS))],
    ids=["image", "grey label", "palette label"],
)
def test_every_flipped_bit_is_refused(path, intact):
    for bit in np.random.RandomState(1).choice(8 * len(intact), 200, replace=False):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        for reader in READERS:
            with pytest.raises(InputError, match="not a readable PNG"):
                reader(path)


def test_every_truncation_is_refused(path):
    for length in range(1, len(INTACT), 7):
        path.write_bytes(INTACT[:length])
        for reader in READERS:
            with pytest.raises(InputError, match=r"truncated|PNG signature"):
                reader(path)


DAMAGED = {
    "empty": (b"", "empty file"),
    "web page": (b"<html>not found</html>", "it does not begin with the PNG signature"),
    "jpeg": (
        encoded(Image.fromarray(RGB), "JPEG"),
        "it does not begin with the PNG signature",
    ),
    "cut within a chunk": (INTACT[:-20], "it is truncated, or a chunk's length is damaged"),
    "without its end": (INTACT[:-12], "it is truncated"),
    "text after its end": (INTACT + b"tail", "4 bytes follow its end"),
    "end with a content": (
        png(header(), IDAT)[:-12] + chunk(b"IEND", b"x"),
        "its last chunk is not empty",
    ),
    "too many chunks": (
        png(header(), chunk(b"teXt", b"") * MAX_CHUNKS, IDAT),
        "it has more than 262144 chunks",
    ),
    "chunk before the header": (png(IDAT, header()), "its first chunk is not a header"),
    "header too long": (png(chunk(b"IHDR", bytes(14)), IDAT), "its first chunk is not a header"),
    "two headers": (png(header(), header(), IDAT), "it has several chunks IHDR"),
    "name of a chunk": (
        png(header(), chunk(b"te\0t", b""), IDAT),
        "the name of a chunk is damaged",
    ),
    "unknown critical chunk": (
        png(header(), chunk(b"CgBI", bytes(4)), IDAT),
        "it needs a chunk that is unknown, CgBI",
    ),
    "no pixel data": (png(header()), "it holds no pixel data"),
    "pixel data interrupted": (
        png(header(), chunk(b"IDAT", STREAM[:9]), chunk(b"tEXt", b""), chunk(b"IDAT", STREAM[9:])),
        "another chunk interrupts its pixel data",
    ),
    "no width": (png(header(0), IDAT), "its header says 0x24, at most 67108864 pixels are read"),
    "decompression bomb": (
        png(header(100_000, 100_000), IDAT),
        "its header says 100000x100000, at most 67108864 pixels are read",
    ),
    "size that overflows 32 bits": (
        png(header(2**31, 2**31 + 1), IDAT),
        "its header says 2147483648x2147483649, at most 67108864 pixels are read",
    ),
    "wider than libpng reads": (
        png(header(1_000_001, 1), IDAT),
        "its header says 1000001x1, a side is at most 1000000 pixels",
    ),
    "deep": (
        png(header(8192, 8192, 16, 6), IDAT),
        "its rows take 536879104 bytes, at most 269484032 are read",
    ),
    "depth of another colour type": (
        png(header(depth=4), IDAT),
        "its header says 4 bits and colour type 2",
    ),
    "unknown colour type": (
        png(header(color_type=7), IDAT),
        "its header says 8 bits and colour type 7",
    ),
    **{
        f"unknown {name}": (
            png(header(methods=methods), IDAT),
            "its header says an unknown compression, filter or interlace method",
        )
        for name, methods in {
            "compression": b"\1\0\0",
            "filter": b"\0\1\0",
            "interlacing": b"\0\0\2",
        }.items()
    },
    "no palette": (png(header(color_type=3), pixels(ID_ROWS)), "its palette is missing"),
    "two palettes": (
        png(header(), chunk(b"PLTE", bytes(3)) * 2, IDAT),
        "it has several chunks PLTE",
    ),
    "palette after the pixels": (
        png(header(), IDAT, chunk(b"PLTE", bytes(3))),
        "its palette follows its pixel data",
    ),
    "palette of a grey image": (
        png(header(color_type=0), chunk(b"PLTE", bytes(3)), pixels(ID_ROWS)),
        "it is grey and has a palette",
    ),
    "palette that is empty": (
        png(header(color_type=3), chunk(b"PLTE", b""), pixels(ID_ROWS)),
        "its palette of 0 bytes does not hold 1 to 256 colours",
    ),
    "palette in part": (
        png(header(color_type=3), chunk(b"PLTE", bytes(10)), pixels(ID_ROWS)),
        "its palette of 10 bytes does not hold 1 to 256 colours",
    ),
    "palette too long": (
        png(header(depth=2, color_type=3), chunk(b"PLTE", bytes(15)), pixels(bytes(24 * 11))),
        "its palette of 15 bytes does not hold 1 to 4 colours",
    ),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_refused_by_its_reason(path, data, reason):
    path.write_bytes(data)
    refused(path, reason)


ZLIB = "Error -3 while decompressing data:"
SIZE = len(ID_ROWS)
STREAMS = {
    "cut": ([zlib.compress(ID_ROWS, 0)[:-40]], "its pixel data ends after 948 of 984 bytes"),
    "without its checksum": (
        [zlib.compress(ID_ROWS)[:-4]],
        "the stream of its pixel data has no end",
    ),
    "of half the rows": (
        [zlib.compress(ID_ROWS[: SIZE // 2])],
        "its pixel data ends after 492 of 984 bytes",
    ),
    "of no rows": ([zlib.compress(b"")], "its pixel data ends after 0 of 984 bytes"),
    "empty": ([b""], "its pixel data ends after 0 of 984 bytes"),
    "of a byte too much": (
        [zlib.compress(ID_ROWS + b"\0")],
        "its pixel data is longer than 984 bytes",
    ),
    "no zlib stream": ([b"garbage"], f"{ZLIB} incorrect header check"),
    "wrong checksum": ([zlib.compress(ID_ROWS)[:-1] + b"x"], f"{ZLIB} incorrect data check"),
    "with a tail": (
        [zlib.compress(ID_ROWS) + b"x"],
        "bytes follow the stream of its pixel data",
    ),
    "with a second stream": (
        [zlib.compress(ID_ROWS), zlib.compress(ID_ROWS)],
        "bytes follow the stream of its pixel data",
    ),
    "unknown filter": ([zlib.compress(b"\5" + ID_ROWS[1:])], "a row has the unknown filter 5"),
    "unknown filter at the end": (
        [zlib.compress(ID_ROWS[:-41] + b"\xff" + bytes(40))],
        "a row has the unknown filter 255",
    ),
}


@pytest.mark.parametrize(("streams", "reason"), STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("color_type", [0, 3], ids=["grey", "palette"])
def test_pixel_data_that_is_not_exactly_the_rows(path, color_type, streams, reason):
    palette = [chunk(b"PLTE", bytes(768))] if color_type == 3 else []
    parts = (chunk(b"IDAT", stream) for stream in streams)
    path.write_bytes(png(header(color_type=color_type), *palette, *parts))
    assert png_size(path) == (24, 40)
    refused(path, reason, read_image, read_label_png)


def test_filters_of_every_pass_are_checked(path):
    """An image of 3x3 pixels has five of the seven passes."""
    sizes = [(1, 1), (1, 1), (1, 2), (2, 1), (1, 3)]  # rows, pixels of a row
    rows = [bytes(1 + columns) for count, columns in sizes for _ in range(count)]
    interlaced = header(3, 3, color_type=0, methods=b"\0\0\1")
    path.write_bytes(png(interlaced, pixels(b"".join(rows))))
    np.testing.assert_array_equal(read_label_png(path), np.zeros((3, 3)))
    for i in range(len(rows)):
        damaged = [b"\6" + row[1:] if i == j else row for j, row in enumerate(rows)]
        path.write_bytes(png(interlaced, pixels(b"".join(damaged))))
        refused(path, "a row has the unknown filter 6", read_image, read_label_png)


def test_index_without_a_colour_is_no_image(path):
    path.write_bytes(png(header(color_type=3), chunk(b"PLTE", bytes(99)), pixels(ID_ROWS)))
    refused(path, "a pixel has colour 33 of a palette of 33", read_image)


def test_a_stream_far_longer_than_its_image_takes_no_memory(path):
    path.write_bytes(png(header(), pixels(bytes(2**26))))
    tracemalloc.start()
    refused(path, "its pixel data is longer than 2904 bytes", read_image)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_decoder_that_disagrees_with_the_header_is_not_believed(path, monkeypatch):
    path.write_bytes(INTACT)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: RGB[:12])
    refused(path, "it does not decode to 40x24 pixels", read_image)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: there is no such file; expected a PNG file$"):
        read_label_png(tmp_path / "none.png")
    refused(tmp_path, "Is a directory")
    refused(tmp_path / "a\0.png", "embedded null byte")
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    refused(loop, "Too many levels of symbolic links")


def test_file_that_may_not_be_read(path, monkeypatch):
    path.write_bytes(INTACT)

    def forbidden(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    refused(path, "Permission denied")


def test_what_might_never_end_is_not_opened(tmp_path):
    pipe, device, bound = (tmp_path / f"{name}.png" for name in ("pipe", "device", "socket"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
        for path in (pipe, device, bound):
            refused(path, "it is a pipe, a socket or a device")


def test_file_larger_than_any_image(path):
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # it takes no space on the disk
    refused(path, "it has 1073741825 bytes, at most 1073741824 are read")
