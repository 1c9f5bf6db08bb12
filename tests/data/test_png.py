import re
import struct
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
    RGB,
    RNG,
    STREAM,
    chunk,
    encoded,
    exif_of,
    header,
    palette_image,
    pixels,
    png,
)

from emanet_triton.data import png_chunks
from emanet_triton.data.png import png_size, read_image, read_label_png, write_png
from emanet_triton.errors import InputError

PALETTE = palette_image(RGB[..., 0])
DEEP = RNG.randint(0, 2**16, (24, 40, 3)).astype(">u2")
DEEP_ROWS = b"".join(b"\0" + row.tobytes() for row in DEEP)


def frame_control(number: int, dispose: int = 0) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 40, 24, 0, 0, 1, 10, dispose, 0))


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
            pixels(DEEP_ROWS),
        ),
        DEEP >> 8,
    ),
    "profile and gamma are not applied": (
        png(
            header(), chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"iCCP", b"x\0\0none"), IDAT
        ),
        RGB,
    ),
    "colour that stands for transparent": (
        png(header(), chunk(b"tRNS", RGB[0, 0].astype(">u2").tobytes()), IDAT),
        RGB,
    ),
    "suggested palette": (png(header(), chunk(b"PLTE", bytes(9)), IDAT), RGB),
    "pixel data in parts": (
        png(header(), *(chunk(b"IDAT", part) for part in (b"", STREAM[:1], STREAM[1:], b""))),
        RGB,
    ),
    "animated, first frame disposed of": (
        png(
            header(),
            chunk(b"acTL", struct.pack(">II", 2, 0)),
            frame_control(0, dispose=1),
            IDAT,
            frame_control(1),
            chunk(b"fdAT", struct.pack(">I", 2) + STREAM),
        ),
        RGB,
    ),
    "animated, without frames": (
        png(header(), chunk(b"acTL", struct.pack(">II", 2, 0)), IDAT),
        RGB,
    ),
    "animated, 16 bits": (
        png(
            header(depth=16),
            chunk(b"acTL", struct.pack(">II", 2, 0)),
            frame_control(0),
            pixels(DEEP_ROWS),
            frame_control(1),
            chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(bytes(len(DEEP_ROWS)))),
        ),
        DEEP >> 8,
    ),
}


@pytest.mark.parametrize(("data", "expected"), IMAGES.values(), ids=IMAGES.keys())
def test_read_image_gives_rgb(path, data, expected):
    path.write_bytes(data)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)
    assert png_size(path) == expected.shape[:2]


@pytest.mark.parametrize("data", [data for data, _ in IMAGES.values()], ids=IMAGES.keys())
def test_a_decoder_gets_a_header_and_rows_only(path, data, monkeypatch):
    """OpenCV writes outside its memory when it reads some animated files."""
    given, decode = [], cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: given.append(args[0]) or decode(*args))
    path.write_bytes(data)
    read_image(path)
    assert [name for name, _ in png_chunks._chunks(given[0].tobytes())] == [
        b"IHDR",
        b"IDAT",
        b"IEND",
    ]


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
    "palette shorter than its ids": (
        png(header(color_type=3), chunk(b"PLTE", bytes(9)), pixels(ID_ROWS)),
        IDS,
    ),
    "grey with an id that stands for transparent": (
        png(header(color_type=0), chunk(b"tRNS", b"\0\7"), pixels(ID_ROWS)),
        IDS,
    ),
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
    with pytest.raises(ValueError, match=r"expected uint8 or uint16 \[H, W\] or uint8"):
        write_png(path, array)


def test_pixels_are_those_of_opencv(path):
    cv2.imwrite(str(path), RGB[..., ::-1])
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[..., ::-1])


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("order", "<>")
def test_orientation_is_applied_as_opencv_applies_it(path, number, order):
    exif = chunk(b"eXIf", exif_of(number, order))
    for parts in ((exif, IDAT), (IDAT, exif)):
        path.write_bytes(png(header(), *parts))
        image = read_image(path)
        np.testing.assert_array_equal(image, cv2.imread(str(path))[..., ::-1])
        assert image.flags.c_contiguous
        assert png_size(path) == image.shape[:2] == ((40, 24) if number > 4 else (24, 40))


def test_a_palette_image_is_turned_and_a_label_is_not(path):
    path.write_bytes(encoded(PALETTE, exif=exif_of(6)))
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path))[..., ::-1])
    np.testing.assert_array_equal(read_label_png(path), np.asarray(PALETTE))


WHOLE = exif_of(3)
DAMAGED_EXIF = {
    "empty": b"",
    "byte order": b"IM" + WHOLE[2:],
    "mark": WHOLE[:2] + b"+\0" + WHOLE[4:],
    "start beyond the end": WHOLE[:4] + b"\xff" * 4 + WHOLE[8:],
    "cut in the entry": WHOLE[:18],
    "another tag": exif_of(3, tag=0x113),
    "no such orientation": exif_of(9),
    "orientation zero": exif_of(0),
}


@pytest.mark.parametrize("exif", DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_exif_that_states_no_orientation(path, exif):
    path.write_bytes(png(header(), chunk(b"eXIf", exif), IDAT))
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], RGB)


def test_the_first_orientation_counts(path):
    path.write_bytes(png(header(), chunk(b"eXIf", exif_of(3)), chunk(b"eXIf", exif_of(6)), IDAT))
    np.testing.assert_array_equal(read_image(path), RGB[::-1, ::-1])
