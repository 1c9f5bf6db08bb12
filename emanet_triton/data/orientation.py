"""The orientation that EXIF data states, and how pixels are turned by it.

Source: Exif 2.32, section 4.6 (the tag Orientation), in the TIFF 6.0 structure, section 2.
"""

import struct

import numpy as np

_ORIENTATION = 0x112  # the tag
_ENTRY_BYTES = 12


def orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, that EXIF data states; 1 if it states none, or is damaged.

    Args:
        exif: the data, from the byte order (``II`` or ``MM``) on.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(count):
            entry = start + 2 + i * _ENTRY_BYTES
            tag, *_, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the data ends early
        pass
    return 1


def oriented(pixels: np.ndarray, number: int) -> np.ndarray:
    """Turn stored pixels [H, W, ...] as orientation ``number``, 1 to 8, says; C-contiguous.

    Orientations 5 to 8 exchange height and width.
    """
    if number >= 5:
        pixels = pixels.swapaxes(0, 1)
    if number in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if number in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def oriented_size(height: int, width: int, number: int) -> tuple[int, int]:
    """(height, width) after ``oriented``."""
    return (width, height) if number >= 5 else (height, width)
