"""The C library's free memory, which it keeps in holes that larger tensors do not fit."""

import ctypes


def give_back() -> None:
    """Return free memory to the system, where the C library is GNU's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
