"""How a process gets memory from the system, and gives it back."""

import ctypes
import os

LARGE = (
    2**20
)  # values of an image; after a smaller one, ``give_back`` takes longer than it is worth
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads this variable once, for its first tensor


def ask_for_large_pages() -> None:
    """Let PyTorch ask Linux for pages of 2 MB for tensors of at least 2 MB.

    The C library returns the memory of a large tensor to the system and takes it anew for the next
    layer, and the system then clears each page. A few large pages take less time than many of 4 kB.
    A process without tensors has to call this; the processes that it starts inherit the setting.
    A value that the user has set stays.
    """
    os.environ.setdefault(LARGE_PAGES, "1")


def give_back() -> None:
    """Return free memory to the system, if the C library is GNU's.

    The C library keeps free memory in holes too small for larger tensors.
    """
    if os.name == "nt":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
