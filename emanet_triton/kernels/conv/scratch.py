"""Memory for the temporary tensors of a convolution on a CPU; each thread uses two parts of it."""

import contextlib
import itertools
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_OF_THREAD = threading.local()


class Scratch:
    """The two parts of a thread's memory, used in turns: a step reads one and writes the other."""

    def __init__(self, memory: tuple[Tensor, Tensor]) -> None:
        self._parts = itertools.cycle(memory)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor in the part that was not taken last."""
        return view(next(self._parts), shape, dtype)

    def cast(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor that was taken last, in another dtype."""
        return source if source.dtype == dtype else self.copy(source, dtype)

    def copy(self, source: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of a tensor that is in the part taken last, or in neither."""
        return self.take(*source.shape, dtype=dtype).copy_(source)


def allocate(device: torch.device, size: int, keep: bool) -> Tensor:
    """Allocate ``size`` bytes, on Linux in a mapping of their own, of huge pages if possible.

    Memory from the C library would leave holes that fit nothing else. With ``keep`` the thread uses
    the memory again at its next call. Without ``keep`` the thread keeps no memory.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8, device=device)
    mapping = getattr(_OF_THREAD, "memory", None)
    if mapping is None or len(mapping) < size:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    _OF_THREAD.memory = mapping if keep else None
    return torch.frombuffer(mapping, dtype=torch.uint8)[:size]


def view(memory: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor at the beginning of some bytes."""
    return memory.view(dtype)[: math.prod(shape)].view(*shape)
