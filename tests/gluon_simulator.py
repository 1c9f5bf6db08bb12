"""Runs the source of a Gluon kernel for Hopper on the CPU, program by program.

Every asynchronous load happens as late as the kernel allows, and until then its target holds NaN.
So a result that is right does not depend on luck. An error is raised where a GPU would hang, and
where the outcome would depend on which of two accesses comes first:

- ``HangError``: a wait for a barrier that nothing completes, or for other bytes than arrive.
- ``RaceError``: a read of what is still being loaded; a write to what is still being read; a read
  of stored values by tensor cores or by a copy without a fence; an element stored twice.

Threads are not simulated: Triton puts its barriers between them. Layouts are not either: Triton
refuses those that do not fit.
"""

import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from emanet_triton.kernels.tile import Tile


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
        if self.unfenced:
            raise RaceError("stored values are read without a fence")

    def before_write(self) -> None:
        if self.loading or self.readers:
            raise RaceError("a buffer is written while it is loaded or read")


class Shared:
    """A view of shared memory."""

    def __init__(self, values: Tensor, regions: Sequence[Region]) -> None:
        self.values = values
        self.regions = regions

    def index(self, i: Any) -> "Shared":
        return Shared(self.values[int(i)], [self.regions[int(i)]])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.values.view(shape), self.regions)

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.values.permute(order), self.regions)

    def store(self, value: Tensor) -> None:
        for region in self.regions:
            region.before_write()
            region.unfenced = True
        assert value.shape == self.values.shape
        assert value.dtype == self.values.dtype
        self.values.copy_(value)


class Barrier:
    """An mbarrier: it completes a phase once all expected bytes have arrived."""

    def __init__(self) -> None:
        self.valid = False
        self.completed = 0  # phases
        self.expected: int | None = None
        self.copies: list[tuple[Shared, Tensor]] = []

    def init(self, count: int) -> None:
        assert count == 1
        assert not self.valid
        self.valid = True

    def expect(self, count: int, pred: Any = True) -> None:
        assert self.valid
        if pred:
            if self.expected is not None:
                raise HangError("a barrier expects two loads in one phase")
            self.expected = int(count)

    def wait(self, phase: Any) -> None:
        assert self.valid
        if self.completed % 2 != int(phase):
            return  # this phase is over
        arrived = sum(values.nbytes for _, values in self.copies)
        if self.expected is None or arrived != self.expected:
            raise HangError(f"{arrived} bytes arrive where {self.expected} are expected")
        for target, values in self.copies:
            target.values.copy_(values)
            target.regions[0].loading = False
        self.completed, self.expected, self.copies = self.completed + 1, None, []

    def invalidate(self) -> None:
        assert self.valid
        if self.copies:
            raise RaceError("a load is not waited for")
        self.valid = False


class Descriptor:
    """A tensor descriptor: blocks of a tensor, with zeros outside."""

    layout = None

    def __init__(self, base: Tensor, block: Sequence[int]) -> None:
        self.base = base
        self.block = tuple(block)
        self.dtype = base.dtype
        nbytes = base.element_size() * torch.Size(block).numel()
        self.block_type = SimpleNamespace(nbytes=nbytes)
        self.stored = torch.zeros(base.shape, dtype=torch.bool)

    def _slices(self, coord: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where the part of a block that exists lies in the tensor, and in the block."""
        there, here = [], []
        for start, size, length in zip(map(int, coord), self.block, self.base.shape, strict=True):
            begin, end = max(start, 0), max(min(start + size, length), max(start, 0))
            there.append(slice(begin, end))
            here.append(slice(begin - start, end - start))
        return tuple(there), tuple(here)

    def load(self, coord: Sequence[Any]) -> Tensor:
        there, here = self._slices(coord)
        values = torch.zeros(self.block, dtype=self.dtype)
        values[here] = self.base[there]
        return values

    def store(self, coord: Sequence[Any], values: Tensor) -> None:
        there, here = self._slices(coord)
        if self.stored[there].any():
            raise RaceError("an element is stored twice")
        self.stored[there] = True
        self.base[there] = values[here]


class Product:
    """A product in flight: its value counts once it has been waited for."""

    def __init__(self, value: Tensor, regions: Sequence[Region]) -> None:
        self.value = value
        self.regions = regions


class Program:
    """What the names of Gluon stand for in one program of a kernel."""

    def __init__(self, number: int) -> None:
        self.regions: list[Region] = []
        self.barriers: list[Barrier] = []
        self.products: list[Product] = []
        self.stores: list[tuple[Descriptor, Sequence[Any], Shared]] = []
        self.gl = SimpleNamespace(
            constexpr=None, int64=torch.int64, float32=torch.float32,
            program_id=lambda axis: torch.tensor(number, dtype=torch.int32),
            static_range=range,
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            full=lambda shape, value, dtype, layout: torch.full(tuple(shape), value, dtype=dtype),
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            where=torch.where, exp=torch.exp, sqrt=torch.sqrt,
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            load=lambda pointer, mask, other: pointer.load(mask, other),
            store=lambda pointer, value, mask: pointer.store(value, mask),
            convert_layout=lambda x, layout: x,
            allocate_shared_memory=self.allocate,
            NVMMADistributedLayout=SimpleNamespace, BlockedLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, count, pred=True: barrier.expect(count, pred),
            wait=lambda barrier, phase: barrier.wait(phase),
            invalidate=lambda barrier: barrier.invalidate(),
        )
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    def names(self) -> dict[str, Any]:
        own = "gl", "mbarrier", "tma", "async_load", "async_store", "fence_async_shared"
        own += "warpgroup_mma", "warpgroup_mma_wait"
        return {name: getattr(self, name) for name in own} | {"tl": self.gl, "EPS": 1e-12}

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout is Barrier:
            barriers = [Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        regions = [Region() for _ in range(shape[0])]
        self.regions += regions
        return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype), regions)

    def async_load(
        self, desc: Descriptor, coord: Sequence[Any], barrier: Barrier, target: Shared, pred=True
    ) -> None:
        if not pred:
            return
        [region] = target.regions
        region.before_write()
        region.loading = True
        target.values.fill_(torch.nan)
        barrier.copies.append((target, desc.load(coord)))

    def async_store(self, desc: Descriptor, coord: Sequence[Any], source: Shared) -> None:
        [region] = source.regions
        region.before_read()
        region.readers.add(desc)
        self.stores.append((desc, coord, source))

    def store_wait(self, pendings: int) -> None:
        while len(self.stores) > pendings:
            desc, coord, source = self.stores.pop(0)
            desc.store(coord, source.values)
            source.regions[0].readers.remove(desc)

    def fence_async_shared(self) -> None:
        for region in self.regions:
            region.unfenced = False

    def warpgroup_mma(self, a: Shared, b: Shared, acc: Tensor, *, use_acc=True, is_async: bool):
        assert is_async
        regions = [*a.regions, *b.regions]
        product = Product(a.values.float() @ b.values.float(), regions)
        assert product.value.shape == acc.shape
        product.value += acc if use_acc else 0
        for region in regions:
            region.before_read()
            region.readers.add(product)
        self.products.append(product)
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Product]) -> Tensor:
        while len(self.products) > outstanding:
            product = self.products.pop(0)
            for region in product.regions:
                region.readers.discard(product)
        [product] = deps
        if product in self.products:
            raise RaceError("a product is used before it is waited for")
        return product.value

    def end(self) -> None:
        """Raise ``RaceError`` if something is still in flight."""
        if self.stores or self.products or any(b.valid or b.copies for b in self.barriers):
            raise RaceError("something is in flight at the end of the program")


def simulate(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    tile: Tile,
    edit: tuple[str, str] | None = None,
) -> None:
    """Run all programs of a kernel, the last one first.

    Args:
        kernel: a function of ``@gluon.jit``.
        programs, arguments, constants, tile: of the launch.
        edit: text of the kernel's source, and what to put in its place.
    """
    constants = {**constants, **tile.meta, "num_warps": tile.num_warps}
    given = [_argument(argument) for argument in arguments]
    for number in reversed(range(programs)):
        program = Program(number)
        _function(kernel, program.names(), edit)(*given, **constants)
        program.end()


def _argument(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Pointer(Global(argument))
    if hasattr(argument, "block_shape"):
        return Descriptor(argument.base, argument.block_shape)
    return argument


def _function(jit: Any, names: dict[str, Any], edit: tuple[str, str] | None = None) -> Any:
    """The Python function of a kernel, or of one that it calls, with other names around it."""
    source = textwrap.dedent(inspect.getsource(jit.fn))
    if edit is not None:
        assert source.count(edit[0]) == 1, edit[0]
        source = source.replace(*edit)
    lines = itertools.dropwhile(lambda line: not line.startswith("def "), _lines(source))
    around = dict(jit.fn.__globals__) | names
    around |= {
        name: _function(value, names)
        for name, value in around.items()
        if hasattr(value, "fn") and name in jit.fn.__code__.co_names
    }
    exec("from __future__ import annotations\n" + "".join(lines), around)
    return around[jit.fn.__name__]


def _lines(source: str) -> Iterator[str]:
    yield from source.splitlines(keepends=True)
