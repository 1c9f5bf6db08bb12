"""Reading a picture of any common kind: its pixels are those of mmcv, or the file is refused."""

from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from emanet_triton.data.decoding import decode_quietly, messages_are_kept
from emanet_triton.data.png import decode_image, png_size
from emanet_triton.data.png_chunks import MAX_PIXELS
from emanet_triton.data.png_chunks import SIGNATURE as PNG_SIGNATURE
from emanet_triton.data.reading import read_regular, refusing
from emanet_triton.errors import first_line

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

# In lower case; the content decides, so these only choose the files of a folder.
SUFFIXES = (".bmp", ".dib", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = "JPEG, PNG, WebP, BMP or TIFF"
HEAD_BYTES = 12  # that ``picture_kind`` looks at
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    PNG_SIGNATURE: "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # with offsets of 64 bits
    b"MM\0+": "TIFF",
}
_MOST_SCANS_PIXELS = 2**31  # a JPEG of few bytes may send its decoder over all pixels often
# What libjpeg prints about files that are whole, such as those of many cameras.
_HARMLESS = (
    "Invalid SOS parameters for sequential JPEG",
    "Unknown Adobe color transform code",
    "Warning: unknown JFIF revision number",
)


def picture_kind(head: bytes) -> str | None:
    """The kind of picture that begins with these bytes, of ``KINDS``; None for anything else.

    Args:
        head: the first ``HEAD_BYTES`` bytes of a file, or more.
    """
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    return next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), None)


def read_picture(path: Path) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, BMP or TIFF file; the content says which of these it is.

    A PNG is decoded as by ``data.png.read_image``, so its labels are those of the evaluation. The
    pixels of other kinds are those of ``cv2.imdecode(..., cv2.IMREAD_COLOR)`` of the installed
    OpenCV, as ``mmcv.imread`` gives them: turned by the orientation in EXIF (in WebP files: newer
    OpenCV only), grey and palettes and CMYK as colours, 16 bits as 8, alpha dropped (OpenCV
    multiplies the colours of a TIFF by it first). An animated WebP gives its first frame, and a
    TIFF of several pages its first page.

    OpenCV returns a part of a truncated picture. So Pillow decodes the file first, and a file that
    only one of the two can decode is refused. A JPEG is decoded once, where the messages of libjpeg
    can be caught: they tell of all damage.

    Returns:
        uint8 RGB [H, W, 3], C-contiguous.

    Raises:
        InputError: the file is missing, not regular, of another kind, damaged, larger than 2**26
            pixels, or a TIFF of samples that are floats, signed or of 32 bits. Damage that the
            format cannot show, such as another colour in a BMP, is not seen.
    """
    with refusing(path, "picture", KINDS):
        data = read_regular(path)
    return decode_picture(data, str(path))


def decode_picture(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels that ``read_picture`` gives, from the content of a file.

    Args:
        data: the content.
        name: what errors call the picture.
        max_pixels: a picture with more is refused before it is decoded; at most 2**26.

    Returns:
        uint8 RGB [H, W, 3], C-contiguous.

    Raises:
        InputError: ``read_picture`` would refuse the file, or the picture has too many pixels.
    """
    kind = picture_kind(data)
    with refusing(name, "picture", KINDS):
        if kind is None:
            raise ValueError("it is of another kind" if data else "empty file")
    with refusing(name, kind):
        if kind == "PNG":
            return decode_image(data, max_pixels)
        image, printed = decode_quietly(partial(_decoded, data, kind, max_pixels))
        lines = [line for line in printed.splitlines() if not line.startswith(_HARMLESS)]
        if lines:
            raise ValueError(lines[0])
        return image


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of the picture that ``read_picture`` gives.

    A PNG is not decoded (``png_size``); a file of another kind is, because only this shows damage.

    Raises:
        InputError: ``read_picture`` refuses the file. It may also refuse a PNG that passes here.
    """
    with refusing(path, "picture", KINDS):
        head = read_regular(path)[:HEAD_BYTES]
    if picture_kind(head) == "PNG":
        return png_size(path)
    height, width, _ = read_picture(path).shape
    return height, width


def _decoded(data: bytes, kind: str, max_pixels: int) -> np.ndarray:
    """The pixels, uint8 RGB [H, W, 3], of a file that Pillow and OpenCV decode.

    Raises:
        ValueError: one of the two does not decode it, it is too large, or its samples have no
            range.
    """
    libjpeg_tells = kind == "JPEG" and messages_are_kept()
    width, height = _checked_size(data, kind, max_pixels, decode=not libjpeg_tells)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        _checked_size(data, kind, max_pixels, decode=True)  # raises the reason, if Pillow sees it
        raise ValueError("OpenCV does not decode it")
    if image.shape not in ((height, width, 3), (width, height, 3)):  # it may be turned
        raise ValueError(f"OpenCV does not decode it to {width}x{height} pixels")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _checked_size(data: bytes, kind: str, max_pixels: int, *, decode: bool) -> tuple[int, int]:
    """(width, height) of a picture whose header Pillow reads; ``decode``: all of which it decodes.

    Raises:
        ValueError: Pillow does not read or decode it; it is too large; its samples have no range.
    """
    try:
        picture = _opened(data, kind)
        width, height = picture.size
        _check_work(data, kind, width * height, max_pixels)
        if picture.mode in ("I", "F"):
            raise ValueError("its samples are floats, signed or of 32 bits")
        if decode:
            picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise whatever they meet
        raise ValueError(first_line(error)) from error
    return width, height


def _check_work(data: bytes, kind: str, pixels: int, max_pixels: int) -> None:
    if not 0 < pixels <= max_pixels:
        raise ValueError(f"its header says {pixels} pixels, at most {max_pixels} are read")
    scans = data.count(b"\xff\xda") if kind == "JPEG" else 1
    if scans * pixels > _MOST_SCANS_PIXELS:
        raise ValueError(f"it has {scans} scans of {pixels} pixels")


def _opened(data: bytes, kind: str) -> "ImageFile":
    """The file's header. ``PIL.Image.open`` would try other kinds and warn about large pictures."""
    from PIL import BmpImagePlugin, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin

    readers: dict[str, Callable[[BytesIO], ImageFile]] = {
        "BMP": BmpImagePlugin.BmpImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "WebP": WebPImagePlugin.WebPImageFile,
    }
    return readers[kind](BytesIO(data))
