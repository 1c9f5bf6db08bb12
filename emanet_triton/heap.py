"""Memory that the C library keeps although it is free, in holes too small for larger tensors."""

import ctypes
import os

LARGE = (
    2**20
)  # values of an image; after a smaller one, ``give_back`` takes longer than it is worth


def give_back() -> None:
    """Return free memory to the system, if the C library is GNU's."""
    if os.name == "nt":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
