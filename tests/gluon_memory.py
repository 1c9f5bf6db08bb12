"""Memory of a simulated GPU: global and shared memory, barriers, tensor descriptors.

See ``gluon_simulator``.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class HangError(Exception):
    """A program would wait for ever."""


class RaceError(Exception):
    """Two accesses come in no certain order."""


class Global:
    """Memory of the GPU as a kernel sees it by a pointer: elements, and who has stored them."""

    def __init__(self, tensor: Tensor) -> None:
        self.values = tensor.view(-1)
        self.stored = torch.zeros(len(self.values), dtype=torch.bool)


class Pointer:
    """Addresses of elements of one tensor."""

    def __init__(self, memory: Global, offsets: Any = 0) -> None:
        self.memory = memory
        self.offsets = offsets

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.offsets + more)

    def _places(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        offsets, mask = torch.broadcast_tensors(torch.as_tensor(self.offsets), mask)
        inside = offsets[mask].long()
        if len(inside) and not 0 <= inside.min() <= inside.max() < len(self.memory.values):
            raise IndexError(f"elements {inside.min()} to {inside.max()}")
        return inside, mask

    def load(self, mask: Tensor, other: float) -> Tensor:
        places, mask = self._places(mask)
        out = torch.full(mask.shape, other, dtype=self.memory.values.dtype)
        out[mask] = self.memory.values[places]
        return out

    def store(self, value: Tensor, mask: Tensor) -> None:
        places, mask = self._places(mask)
        if len(places.unique()) < len(places) or self.memory.stored[places].any():
            raise RaceError("an element is stored twice")
        self.memory.stored[places] = True
        self.memory.values[places] = value.broadcast_to(mask.shape)[mask]


class Region:
    """A buffer in shared memory: what happens to it at the moment."""

    def __init__(self) -> None:
        self.loading = False
        self.unfenced = False
        self.readers: set[object] = set()

    def before_read(self) -> None:
        if self.loading:
            raise RaceError("a buffer is read while it is loaded")

    def before_async_read(self) -> None:
        """A read by tensor cores or by a copy."""
        self.before_read()
        if self.unfenced:
            raise RaceError("stored values are read without a fence")

    def before_write(self) -> None:
        if self.loading or self.readers:
            raise RaceError("a buffer is written while it is loaded or read")


def checked(index: Any) -> int:
    """An index that counts from the first element on; a GPU knows no other."""
    if index < 0:
        raise IndexError(f"index {index}")
    return int(index)


class Shared:
    """A view of shared memory."""

    def __init__(self, values: Tensor, regions: Sequence[Region]) -> None:
        self.values = values
        self.regions = regions
        self.dtype = values.dtype

    def index(self, i: Any) -> "Shared":
        i = checked(i)
        return Shared(self.values[i], [self.regions[i]])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.values.view(shape), self.regions)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.values.permute(order), self.regions)

    def load(self, layout: Any) -> Tensor:
        for region in self.regions:
            region.before_read()
        return self.values.clone()

    def store(self, value: Tensor) -> None:
        for region in self.regions:
            region.before_write()
            region.unfenced = True
        assert value.shape == self.values.shape
        assert value.dtype == self.values.dtype
        self.values.copy_(value)


class Barrier:
    """An mbarrier: a phase completes once all have arrived, and all bytes that they expect."""

    def __init__(self) -> None:
        self.count = 0
        self.arrived = 0
        self.completed = 0  # phases
        self.expected = 0  # bytes
        self.copies: list[tuple[Shared, Tensor]] = []

    def init(self, count: int) -> None:
        assert not self.count
        self.count = count

    def arrive(self) -> None:
        assert self.count
        if self.arrived == self.count:
            raise HangError("one more arrives at a barrier than it counts")
        self.arrived += 1
        if not self.expected:
            self._complete_if_possible()

    def expect(self, count: int) -> None:
        self.expected += int(count)
        self.arrive()

    def is_over(self, phase: Any) -> bool:
        """Whether a phase is over; loads arrive only now, as late as possible."""
        assert self.count
        if self.completed % 2 == int(phase):
            self._complete_if_possible()
        return self.completed % 2 != int(phase)

    def _complete_if_possible(self) -> None:
        if self.arrived < self.count or self.bytes() != self.expected:
            return
        for target, values in self.copies:
            target.values.copy_(values)
            target.regions[0].loading = False
        self.arrived, self.expected, self.copies = 0, 0, []
        self.completed += 1

    def bytes(self) -> int:
        """Of the loads that are under way."""
        return sum(values.nbytes for _, values in self.copies)

    def invalidate(self) -> None:
        assert self.count
        if self.copies:
            raise RaceError("a load is not waited for")
        self.count = 0


class Descriptor:
    """A tensor descriptor: blocks of a tensor, with zeros outside."""

    layout = None

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base = base
        self.block_shape = list(block)
        self.dtype = base.dtype
        nbytes = base.element_size() * torch.Size(block).numel()
        self.block_type = SimpleNamespace(nbytes=nbytes)
        self.stored = torch.zeros(base.shape, dtype=torch.bool)

    def _slices(self, coord: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of a block that exists lies in the tensor, and in the block."""
        there, here = [], []
        for start, size, length in zip(
            map(int, coord), self.block_shape, self.base.shape, strict=True
        ):
            begin, end = max(start, 0), max(min(start + size, length), max(start, 0))
            there.append(slice(begin, end))
            here.append(slice(begin - start, end - start))
        return tuple(there), tuple(here)

    def load(self, coord: Sequence[Any]) -> Tensor:
        there, here = self._slices(coord)
        values = torch.zeros(self.block_shape, dtype=self.dtype)
        values[here] = self.base[there]
        return values

    def store(self, coord: Sequence[Any], values: Tensor) -> None:
        there, here = self._slices(coord)
        if self.stored[there].any():
            raise RaceError("an element is stored twice")
        self.stored[there] = True
        self.base[there] = values[here]
