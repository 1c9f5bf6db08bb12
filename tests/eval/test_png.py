import io
import re
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from emanet_triton.errors import InputError
from emanet_triton.eval.png import png_size, read_image, read_label_png, write_png

READERS = (png_size, read_image, read_label_png)
RNG = np.random.RandomState(0)
RGB = RNG.randint(0, 256, (24, 40, 3)).astype(np.uint8)
IDS = RNG.randint(0, 34, (24, 40)).astype(np.uint8)
ROWS = b"".join(b"\0" + row.tobytes() for row in RGB)


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def header(width: int = 40, height: int = 24, depth: int = 8, color_type: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def palette_image(ids: np.ndarray) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(RNG.randint(0, 256, 768).astype(np.uint8).tobytes())
    return image


IDAT = chunk(b"IDAT", zlib.compress(ROWS))
INTACT = png(header(), chunk(b"tEXt", b"Comment\0ancillary"), IDAT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.png"


def refused(path: Path, reason: str, *readers) -> None:
    for reader in readers or READERS:
        with pytest.raises(InputError) as caught:
            reader(path)
        assert str(caught.value) == (
            f"{path}: not a readable PNG ({reason}); expected an intact PNG file"
        )


PALETTE = palette_image(RGB[..., 0])
DEEP = RNG.randint(0, 2**16, (24, 40, 3)).astype(">u2")
ROTATED = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x112, 3, 1, 3, 0) + b"\0\0\0\0"
IMAGES = {
    "rgb": (INTACT, RGB),
    "grey": (encoded(Image.fromarray(IDS)), np.dstack([IDS] * 3)),
    "grey 1 bit": (
        encoded(Image.fromarray(IDS > 16)),
        np.dstack([np.where(IDS > 16, 255, 0)] * 3),
    ),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with alpha": (
        encoded(PALETTE, transparency=bytes(range(256))),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "rgba drops alpha": (encoded(Image.fromarray(np.dstack([RGB, IDS]))), RGB),
    "16 bits": (
        png(
            header(depth=16),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in DEEP))),
        ),
        DEEP >> 8,
    ),
    "orientation is not applied": (png(header(), chunk(b"eXIf", ROTATED), IDAT), RGB),
}


@pytest.mark.parametrize(("data", "expected"), IMAGES.values(), ids=IMAGES.keys())
def test_read_image_gives_rgb(path, data, expected):
    path.write_bytes(data)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)
    assert png_size(path) == expected.shape[:2]


LABELS = {
    "grey": (encoded(Image.fromarray(IDS)), IDS),
    "grey 16 bits": (
        encoded(Image.fromarray(IDS.astype(np.uint16) * 1000)),
        IDS.astype(np.uint16) * 1000,
    ),
    "palette": (encoded(palette_image(IDS)), IDS),
    "palette 4 bits": (encoded(palette_image(IDS % 16), bits=4), IDS % 16),
    "palette 2 bits": (encoded(palette_image(IDS % 4), bits=2), IDS % 4),
    "palette 1 bit": (encoded(palette_image(IDS % 2), bits=1), IDS % 2),
}


@pytest.mark.parametrize(("data", "expected"), LABELS.values(), ids=LABELS.keys())
def test_read_label_png_keeps_ids(path, data, expected):
    path.write_bytes(data)
    ids = read_label_png(path)
    assert ids.dtype == expected.dtype
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (INTACT, "8-bit colour or alpha"),
        (encoded(Image.fromarray(np.dstack([RGB, IDS]))), "8-bit colour or alpha"),
        (encoded(Image.fromarray(IDS).convert("LA")), "8-bit colour or alpha"),
        (encoded(Image.fromarray(IDS > 16)), "1-bit grey"),
        (
            png(header(depth=4, color_type=0), chunk(b"IDAT", zlib.compress(bytes(24 * 21)))),
            "4-bit grey",
        ),
    ],
    ids=["rgb", "rgba", "grey with alpha", "grey 1 bit", "grey 4 bits"],
)
def test_read_label_png_refuses_what_holds_no_ids(path, data, kind):
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_label_png(path)
    assert str(caught.value) == (
        f"{path}: not a label PNG ({kind}); expected one id a pixel, "
        "as grey of 8 or 16 bits or as palette indices"
    )


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
    "chunk before the header": (png(IDAT, header()), "its first chunk is not a header"),
    "no pixel data": (png(header()), "it holds no pixel data"),
    "no width": (png(header(0), IDAT), "its header says 0x24, at most 67108864 pixels are read"),
    "decompression bomb": (
        png(header(100_000, 100_000), IDAT),
        "its header says 100000x100000, at most 67108864 pixels are read",
    ),
}


@pytest.mark.parametrize(("data", "reason"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_refused_by_its_reason(path, data, reason):
    path.write_bytes(data)
    refused(path, reason)


@pytest.mark.parametrize(
    "compressed",
    [zlib.compress(ROWS)[:-40], zlib.compress(ROWS[:500]), b"garbage"],
    ids=["cut stream", "too few rows", "no zlib stream"],
)
def test_pixel_data_that_only_decoders_can_judge(path, compressed):
    path.write_bytes(png(header(), chunk(b"IDAT", compressed)))
    refused(path, "the pixel data does not decode", read_image)
    path.write_bytes(png(header(color_type=0), chunk(b"IDAT", compressed[:20])))
    with pytest.raises(InputError, match="not a readable PNG"):
        read_label_png(path)


def test_decoder_that_disagrees_with_the_header_is_not_believed(path, monkeypatch):
    path.write_bytes(INTACT)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: RGB[:12])
    refused(path, "it does not decode to 40x24 pixels", read_image)


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.png", "No such file or directory")
    refused(tmp_path, "Is a directory")


@pytest.mark.parametrize("array", [RGB, IDS], ids=["rgb", "grey"])
def test_write_png_round_trip(path, array):
    write_png(path, array)
    write_png(path, array)
    np.testing.assert_array_equal((read_image if array.ndim == 3 else read_label_png)(path), array)
    assert list(path.parent.iterdir()) == [path]


def test_write_png_where_it_cannot(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path, reason in {
        tmp_path / "none" / "a.png": "No such file or directory",
        tmp_path / "file" / "a.png": "Not a directory",
        tmp_path / "folder": "Is a directory",
    }.items():
        message = f"{path}: cannot be written ({reason})"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            write_png(path, IDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_interrupted_write_keeps_the_old_file(path, monkeypatch):
    write_png(path, IDS)

    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_png(path, IDS + 1)
    np.testing.assert_array_equal(read_label_png(path), IDS)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "array",
    [IDS.astype(np.int64), np.dstack([RGB, IDS]), IDS[0]],
    ids=["int64", "rgba", "one row"],
)
def test_write_png_of_something_else_is_a_programming_error(path, array):
    with pytest.raises(ValueError, match=r"expected uint8 \[H, W\] or \[H, W, 3\]"):
        write_png(path, array)


def test_pixels_are_those_of_opencv(path):
    cv2.imwrite(str(path), RGB[..., ::-1])
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[..., ::-1])
