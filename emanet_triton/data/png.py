"""Reading and writing PNG files: a file is read correctly or refused.

Decoders treat damaged, animated and unusual files differently. So this package checks the chunks
and inflates the pixel data itself, and gives OpenCV a new file that has only a header and rows.
"""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from emanet_triton.data.orientation import orientation, oriented, oriented_size
from emanet_triton.data.png_chunks import GREY, MAX_PIXELS, PALETTE, Chunks, Header, parse
from emanet_triton.data.png_rows import bare_png, inflate
from emanet_triton.data.reading import read_regular, refusing
from emanet_triton.errors import InputError
from emanet_triton.files import write_output


def read_image(path: Path) -> np.ndarray:
    """Decode a colour, palette, grey or RGBA PNG (alpha is dropped, 16 bits become 8).

    An animated PNG gives its still image. The image is turned as the orientation in its eXIf chunk
    says, because OpenCV turns it since version 4.5.2. Colour profiles and similar chunks are
    ignored.

    Returns:
        uint8 RGB [H, W, 3]: the pixels as OpenCV decodes them, as in the published evaluation.

    Raises:
        InputError: the file is missing, no PNG, damaged anywhere or absurdly large, or a pixel
            has no colour in the palette.
    """
    with refusing(path, "PNG"):
        return decode_image(read_regular(path))


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels that ``read_image`` gives, from the content of a PNG file.

    Args:
        data: the content.
        max_pixels: an image with more is refused before its pixels are inflated.

    Raises:
        ValueError, zlib.error, cv2.error: ``read_image`` would refuse the file, or the image has
            too many pixels.
    """
    chunks = parse(data)
    width, height = chunks.header.width, chunks.header.height
    if width * height > max_pixels:
        raise ValueError(f"its header says {width}x{height}, at most {max_pixels} pixels are read")
    return oriented(_pixels(chunks), orientation(chunks.exif))


def read_label_png(path: Path) -> np.ndarray:
    """Decode a label PNG to the ids that it stores: grey values or palette indices.

    An index that has no colour in the palette is also an id; Pillow writes such files. The label is
    not turned as its eXIf chunk says: mmsegmentation decodes labels with Pillow, which does not.

    Returns:
        uint8 [H, W], or uint16 for a 16-bit file.

    Raises:
        InputError: the file is missing, no PNG, damaged anywhere or absurdly large; or its
            values are not ids, because it holds colours or grey of fewer than 8 bits.
    """
    with refusing(path, "PNG"):
        chunks = parse(read_regular(path))
        header = chunks.header
        if header.color_type == PALETTE:
            return _indices(chunks)
        if header.color_type == GREY and header.bit_depth >= 8:
            return _decode(chunks, header, cv2.IMREAD_UNCHANGED)
        kind = "grey" if header.color_type == GREY else "colour or alpha"
        raise InputError(
            f"{path}: not a label PNG ({header.bit_depth}-bit {kind}); expected one id a pixel, "
            "as grey of 8 or 16 bits or as palette indices"
        )


def png_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels, as ``read_image`` gives them, of a PNG whose chunks are intact.

    The pixel data is not inflated. So a file whose writer compressed wrong rows passes here, and
    ``read_image`` refuses it.

    Raises:
        InputError: the file is missing, no PNG, damaged anywhere or absurdly large.
    """
    with refusing(path, "PNG"):
        chunks = parse(read_regular(path))
        header = chunks.header
        return oriented_size(header.height, header.width, orientation(chunks.exif))


def write_png(path: Path, array: np.ndarray) -> None:
    """Write uint8 or uint16 grey [H, W], or uint8 RGB [H, W, 3], as a whole file or not at all.

    Raises:
        InputError: the folder is missing or the file cannot be written.
        ValueError: the array has another shape or dtype.
    """
    write_output(path, encode_png(array, str(path)))


def encode_png(array: np.ndarray, name: str = "the picture") -> bytes:
    """The content of the file that ``write_png`` writes.

    Args:
        array: uint8 or uint16 grey [H, W], or uint8 RGB [H, W, 3].
        name: what errors call the picture.

    Raises:
        InputError: a side is longer than OpenCV writes.
        ValueError: the array has another shape or dtype.
    """
    grey = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    if not grey and not (array.dtype == np.uint8 and array.shape[2:] == (3,)):
        raise ValueError(
            f"expected uint8 or uint16 [H, W] or uint8 [H, W, 3], got {array.dtype} {array.shape}"
        )
    pixels = array if array.ndim == 2 else cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".png", pixels)
    if not done:
        height, width = array.shape[:2]
        raise InputError(f"{name}: OpenCV writes no PNG of {width}x{height} pixels")
    return encoded.tobytes()


def _pixels(chunks: Chunks) -> np.ndarray:
    """The stored pixels in colour, uint8 RGB [H, W, 3]."""
    if chunks.header.color_type == PALETTE:
        return _colors(_indices(chunks), chunks.palette)
    return cv2.cvtColor(_decode(chunks, chunks.header, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _indices(chunks: Chunks) -> np.ndarray:
    """The palette indices, uint8 [H, W]. OpenCV decodes them as grey and scales them to 0..255."""
    header = replace(chunks.header, color_type=GREY)
    return _decode(chunks, header, cv2.IMREAD_UNCHANGED) // (255 // (2**header.bit_depth - 1))


def _colors(indices: np.ndarray, palette: bytes) -> np.ndarray:
    """The colours of palette indices, uint8 RGB [H, W, 3]."""
    table = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    if (largest := indices.max()) >= len(table):
        raise ValueError(f"a pixel has colour {largest} of a palette of {len(table)}")
    return np.take(table, indices, axis=0)


def _decode(chunks: Chunks, header: Header, flags: int) -> np.ndarray:
    """Decode the pixel data with OpenCV, under a header with the same row sizes."""
    image = cv2.imdecode(bare_png(header, inflate(chunks.pixel_data, header)), flags)
    if image is None:
        raise ValueError("the pixel data does not decode")
    if image.shape[:2] != (header.height, header.width):
        raise ValueError(f"it does not decode to {header.width}x{header.height} pixels")
    return image
