"""Pictures are read as mmcv reads them, or refused; meanwhile no C library prints anything."""

import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile
from png_files import INTACT, encoded, exif_of, palette_image

from emanet_triton.data.decoding import decode_quietly
from emanet_triton.data.picture import (
    HEAD_BYTES,
    SUFFIXES,
    decode_picture,
    picture_kind,
    read_picture,
)
from emanet_triton.data.png import read_image
from emanet_triton.data.png_chunks import MAX_PIXELS
from emanet_triton.data.reading import MAX_FILE_BYTES
from emanet_triton.errors import InputError

KINDS = "JPEG, PNG, WebP, BMP or TIFF"
ROWS, COLUMNS = np.mgrid[:24, :40].astype(np.uint8)
GREY = 4 * ROWS + 3 * COLUMNS
ALPHA = np.random.RandomState(1).randint(0, 256, (24, 40)).astype(np.uint8)
COLOR = np.dstack([GREY, GREY[::-1], 255 - GREY])
RGB, L = Image.fromarray(COLOR), Image.fromarray(GREY)
RGBA = Image.fromarray(np.dstack([COLOR, ALPHA]))
OTHER = Image.fromarray(255 - COLOR)
P, ONE_BIT = palette_image(GREY), Image.fromarray(GREY > 60)
CMYK = RGB.convert("CMYK")
DEEP = Image.fromarray(256 * GREY.astype(np.uint16) + ALPHA)
NOISE = Image.fromarray(np.random.RandomState(2).randint(0, 256, (60, 80, 3)).astype(np.uint8))
PAGES = {"save_all": True, "append_images": [OTHER]}
JPEG = encoded(NOISE, "JPEG")
SCANS = encoded(NOISE, "JPEG", progressive=True)
LZW = encoded(NOISE, "TIFF", compression="tiff_lzw")


def by_opencv(image: np.ndarray) -> bytes:
    return cv2.imencode(".tif", image)[1].tobytes()


WHOLE = {
    "JPEG": JPEG,
    "JPEG in scans": SCANS,
    "JPEG grey": encoded(L, "JPEG"),
    "JPEG CMYK": encoded(CMYK, "JPEG"),
    "JPEG with bytes after its end": JPEG + b"a film of a phone",
    "JPEG of some cameras": JPEG.replace(b"\0\x3f\0", b"\0\0\0"),
    "PNG": encoded(RGB),
    "PNG with alpha": encoded(RGBA),
    "PNG 16 bits": encoded(DEEP),
    "PNG palette": encoded(P),
    "WebP": encoded(RGB, "WEBP"),
    "WebP lossless": encoded(RGB, "WEBP", lossless=True),
    "WebP with alpha": encoded(RGBA, "WEBP", lossless=True, exact=True),
    "WebP animated": encoded(RGB, "WEBP", lossless=True, **PAGES),
    "BMP": encoded(RGB, "BMP"),
    "BMP grey": encoded(L, "BMP"),
    "BMP palette": encoded(P, "BMP"),
    "BMP 1 bit": encoded(ONE_BIT, "BMP"),
    "BMP with alpha": encoded(RGBA, "BMP"),
    "TIFF": encoded(RGB, "TIFF"),
    "TIFF LZW": LZW,
    "TIFF deflate": encoded(RGB, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF JPEG": encoded(RGB, "TIFF", compression="jpeg"),
    "TIFF grey": encoded(L, "TIFF"),
    "TIFF grey 16 bits": encoded(DEEP, "TIFF"),
    "TIFF colour 16 bits": by_opencv(256 * COLOR.astype(np.uint16) + ALPHA[..., None]),
    "TIFF palette": encoded(P, "TIFF"),
    "TIFF fax": encoded(ONE_BIT, "TIFF", compression="group4"),
    "TIFF with alpha": encoded(RGBA, "TIFF"),
    "TIFF CMYK": encoded(CMYK, "TIFF"),
    "TIFF of two pages": encoded(RGB, "TIFF", **PAGES),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "street.jpg"


def refused(path: Path, kind: str, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        read_picture(path)
    expected = KINDS if kind == "picture" else kind
    assert re.fullmatch(
        f"{re.escape(str(path))}: not a readable {kind} \\({reason}\\); "
        f"expected an intact {expected} file",
        str(caught.value),
    ), str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_pixels_are_those_of_opencv(path, name):
    path.write_bytes(WHOLE[name])
    assert picture_kind(WHOLE[name][:HEAD_BYTES]) == name.split()[0]
    expected = cv2.imread(str(path))
    if expected is None:  # OpenCV 4.10 does not read an animated WebP
        refused(path, name.split()[0], "OpenCV does not decode it")
        return
    image = read_picture(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected[..., ::-1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BMP palette", np.asarray(P.convert("RGB"))),
        ("WebP with alpha", COLOR),
        ("TIFF of two pages", COLOR),
        ("TIFF grey 16 bits", np.dstack([GREY] * 3)),
        ("BMP 1 bit", np.dstack([np.where(GREY > 60, 255, 0)] * 3)),
    ],
)
def test_pixels_are_those_that_were_written(path, name, expected):
    path.write_bytes(WHOLE[name])
    np.testing.assert_array_equal(read_picture(path), expected)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_opencv_applies_it(path, kind, number):
    options = {"lossless": True} if kind == "WEBP" else {}
    exif = (b"" if kind == "PNG" else b"Exif\0\0") + exif_of(number)
    path.write_bytes(encoded(RGB, kind, exif=exif, **options))
    image = read_picture(path)
    # As mmcv; ``cv2.imread`` of OpenCV 5.0 fails where a TIFF exchanges height and width.
    want = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(image, want[..., ::-1])
    if kind != "WEBP":  # which newer OpenCV turns
        assert image.shape == ((40, 24, 3) if number > 4 else (24, 40, 3))


def test_a_png_is_read_as_the_evaluation_reads_it(path):
    path.write_bytes(INTACT)
    np.testing.assert_array_equal(read_picture(path), read_image(path))
    path.write_bytes(INTACT[:-20])
    refused(path, "PNG", "it is truncated, or a chunk's length is damaged")


def test_suffixes_name_the_kinds():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"} <= set(SUFFIXES)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in SUFFIXES)
    assert picture_kind(b"") is None
    assert picture_kind(b"RIFF\0\0\0\0WAVE") is None


@pytest.mark.parametrize("data", [JPEG, SCANS], ids=["JPEG", "JPEG in scans"])
def test_every_truncated_jpeg_is_refused(path, data):
    for length in [*range(3, len(data) - 3, 61), len(data) - 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="not a readable JPEG"):
            read_picture(path)


@pytest.mark.parametrize("name", ["WebP", "WebP lossless", "BMP", "BMP palette", "TIFF LZW"])
def test_every_truncation_of_other_kinds_is_refused(path, name):
    data = WHOLE[name]
    for length in range(HEAD_BYTES, len(data) - 1, max(1, len(data) // 50)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=f"not a readable {name.split()[0]}"):
            read_picture(path)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    at = data.index(b"\xff\xc0") + 5 if b"\xff\xc0" in data else data.index(b"\xff\xc2") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def bmp_of_size(width: int, height: int) -> bytes:
    return encoded(RGB, "BMP")[:18] + struct.pack("<ii", width, height) + encoded(RGB, "BMP")[26:]


LAST_SCAN = SCANS[SCANS.rindex(b"\xff\xda") : -2]
LOST = JPEG[: len(JPEG) // 2] + JPEG[len(JPEG) // 2 + 400 :]
TOO_LARGE = f"its header says [0-9]+ pixels, at most {MAX_PIXELS} are read"
DAMAGED = {
    "empty": (b"", "picture", "empty file"),
    "text": (b"a picture of a street", "picture", "it is of another kind"),
    "web page": (b"<html>404</html>", "picture", "it is of another kind"),
    "GIF": (encoded(P, "GIF"), "picture", "it is of another kind"),
    "text that begins as a BMP": (b"BMW is a car", "BMP", ".+"),
    "signature alone": (JPEG[:3], "JPEG", ".+"),
    "JPEG without a middle": (LOST, "JPEG", "Corrupt JPEG data: .+"),
    "JPEG of zeros": (JPEG[:-400] + bytes(398) + JPEG[-2:], "JPEG", "Corrupt JPEG data: .+"),
    "absurdly large JPEG": (with_size(JPEG, 65_500, 65_500), "JPEG", TOO_LARGE),
    "absurdly large BMP": (bmp_of_size(10**6, 10**6), "BMP", TOO_LARGE),
    "BMP of no height": (bmp_of_size(40, 0), "BMP", ".+"),
    "JPEG of many scans": (
        with_size(SCANS, 8192, 8192)[:-2] + 100 * LAST_SCAN + SCANS[-2:],
        "JPEG",
        "it has 110 scans of 67108864 pixels",
    ),
    "TIFF of floats": (
        encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        "TIFF",
        "its samples are floats, signed or of 32 bits",
    ),
    "TIFF of 32 bits": (
        encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
        "TIFF",
        "its samples are floats, signed or of 32 bits",
    ),
    "TIFF of colours in floats": (by_opencv(COLOR.astype(np.float32)), "TIFF", ".+"),
    "TIFF with a damaged stream": (LZW[:2000] + bytes(50) + LZW[2050:], "TIFF", ".+"),
}


@pytest.mark.parametrize(("data", "kind", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_refused_by_its_reason(path, data, kind, reason):
    path.write_bytes(data)
    refused(path, kind, reason)


@pytest.mark.parametrize(
    ("decoded", "reason"),
    [
        (None, "OpenCV does not decode it"),
        (COLOR[:12], "OpenCV does not decode it to 80x60 pixels"),
        (GREY, "OpenCV does not decode it to 80x60 pixels"),
    ],
    ids=["not at all", "another size", "grey"],
)
def test_opencv_must_agree_with_pillow(path, monkeypatch, decoded, reason):
    path.write_bytes(JPEG)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoded)
    refused(path, "JPEG", reason)


@pytest.mark.parametrize(("data", "kind"), [(JPEG, "JPEG"), (encoded(NOISE), "PNG")])
def test_a_limit_of_pixels(path, data, kind):
    path.write_bytes(data)
    assert np.array_equal(decode_picture(data, "it", max_pixels=60 * 80), read_picture(path))
    with pytest.raises(InputError, match=f"it: not a readable {kind} .*, at most 4799 "):
        decode_picture(data, "it", max_pixels=60 * 80 - 1)


def test_what_is_no_regular_file(tmp_path):
    pipe, device, large = tmp_path / "pipe.jpg", tmp_path / "zero.jpg", tmp_path / "large.jpg"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with large.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    refused(pipe, "picture", "it is a pipe, a socket or a device")
    refused(device, "picture", "it is a pipe, a socket or a device")
    refused(large, "picture", "it has 1073741825 bytes, at most 1073741824 are read")
    refused(tmp_path, "picture", "Is a directory")
    with pytest.raises(InputError) as raised:
        read_picture(tmp_path / "none.jpg")
    assert str(raised.value) == (
        f"{tmp_path / 'none.jpg'}: there is no such file; expected a {KINDS} file"
    )


def test_a_program_that_lets_pillow_accept_truncated_files(path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path.write_bytes(JPEG[:-100])
    refused(path, "JPEG", "image file is truncated .+")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


PROGRAM = """
import ctypes, os, sys
from pathlib import Path
from emanet_triton.data.picture import read_picture

for name in sys.argv[1:]:
    try:
        read_picture(Path(name))
        print("read")
    except ValueError:
        print("refused", flush=True)
libc = ctypes.CDLL(None)
libc.fputs(b"seen", ctypes.c_void_p.in_dll(libc, "stderr"))
"""


def test_c_libraries_print_nothing_while_files_are_read(tmp_path):
    names = [name for name in DAMAGED if "pixels" not in name]
    for name in names:
        (tmp_path / name).write_bytes(DAMAGED[name][0])
    (tmp_path / "whole").write_bytes(WHOLE["JPEG of some cameras"])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *names, "whole"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["refused"] * len(names) + ["read"]
    assert done.stderr == "seen"


def test_threads_read_at_once_and_only_damaged_files_are_refused(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(60)]
    for i, path in enumerate(paths):
        path.write_bytes(LOST if i % 7 == 3 else JPEG)

    def is_read(path: Path) -> bool:
        try:
            return read_picture(path).shape == (60, 80, 3)
        except InputError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_read, paths)) == [i % 7 != 3 for i in range(60)]


def test_a_child_reads_as_its_parent_does(path):
    path.write_bytes(LOST)
    refused(path, "JPEG", "Corrupt JPEG data: .+")
    child = os.fork()
    if not child:
        code = 1
        try:
            refused(path, "JPEG", "Corrupt JPEG data: .+")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_an_error_of_a_decoder_leaves_no_settings_behind():
    def fails() -> None:
        assert ImageFile.LOAD_TRUNCATED_IMAGES is False
        raise KeyError("decoder")

    for _ in range(2):
        with pytest.raises(KeyError):
            decode_quietly(fails)
    assert decode_quietly(lambda: 3) == (3, "")
