"""Runs the source of a Gluon kernel for Hopper on the CPU, program by program.

Every asynchronous load happens as late as the kernel allows, and until then its target holds NaN.
So a result that is right does not depend on luck. An error is raised where a GPU would hang, and
where the outcome would depend on which of two accesses comes first:

- ``HangError``: a wait for a barrier that nothing completes, or for other bytes than arrive.
- ``RaceError``: a read of what is still being loaded; a write to what is still being read; a read
  of stored values by tensor cores or by a copy without a fence; an element stored twice; a store,
  or a read of what the kernel before writes, before ``gdc_wait`` if the kernels overlap.

A kernel whose warps have roles, its partitions, runs in one of several orders (see ``Turns``).

Threads are not simulated: Triton puts its barriers between them. Layouts are not either: Triton
refuses those that do not fit. Numbers are Python's: of negative ones ``//`` and ``%`` differ from
Triton's, and none is too large for 32 bits.
"""

import functools
import inspect
import textwrap
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from gluon_memory import (
    Barrier,
    Descriptor,
    Global,
    HangError,
    Pointer,
    RaceError,
    Region,
    Shared,
    checked,
)
from torch import Tensor
from triton.language import constexpr

from emanet_triton.kernels.tile import Tile


class Product:
    """A product in flight: other products may be added to it, but nobody may read it."""

    def __init__(self, value: Tensor, regions: Sequence[Region]) -> None:
        self.value = value
        self.regions = regions

    def _read(self, *_: Any) -> None:
        raise RaceError("a product is used before it is waited for")

    __getattr__ = __mul__ = __add__ = _read


class Turns:
    """Partitions of a program, of which one runs at a time: the first that can.

    A partition may lose its turn whenever it arrives at a barrier or waits for one.

    Args:
        partitions: what they run.
        order: their numbers, those with precedence first.
    """

    def __init__(self, partitions: Sequence[Callable[[], None]], order: Sequence[int]) -> None:
        self.order = order
        self.ready: dict[int, Callable[[], bool]] = dict.fromkeys(order, lambda: True)
        self.go_on = {number: threading.Semaphore(0) for number in order}
        self.running = order[0]
        self.over = threading.Semaphore(0)
        self.error: BaseException | None = None
        for number in order:
            threading.Thread(target=self._work, args=(number, partitions[number])).start()

    def run(self) -> None:
        """Let all partitions run to their ends."""
        self.go_on[self.running].release()
        self.over.acquire()
        if self.error:
            raise self.error

    def wait(self, ready: Callable[[], bool], why: str = "") -> None:
        """Come back once ``ready`` is true, after all that have precedence and can run."""
        me = self.running
        self.ready[me] = ready
        following = self._next()
        if following is None:
            raise HangError(why)
        if following != me:
            self._pass_to(following)
            self._await(me)

    def _next(self) -> int | None:
        return next((n for n in self.order if n in self.ready and self.ready[n]()), None)

    def _pass_to(self, number: int) -> None:
        self.running = number
        self.go_on[number].release()

    def _await(self, me: int) -> None:
        self.go_on[me].acquire()
        if self.error:
            raise SystemExit  # another partition has failed

    def _work(self, me: int, partition: Callable[[], None]) -> None:
        try:
            self._await(me)
            partition()
            del self.ready[me]
            following = self._next()
            if following is not None:
                self._pass_to(following)
            elif self.ready:
                raise HangError("a partition waits for one that has ended")
            else:
                self.over.release()
        except SystemExit:
            pass
        except Exception as error:
            self.error = error
            for go_on in self.go_on.values():
                go_on.release()
            self.over.release()


def static_assert(holds: bool) -> None:
    assert holds


class Program:
    """What the names of Gluon stand for in one program of a kernel."""

    def __init__(
        self, number: int, programs: int, order: Sequence[int], newer: Sequence[Tensor] | None
    ) -> None:
        self.order = order
        self.newer = None if newer is None else {tensor.data_ptr() for tensor in newer}
        self.turns: Turns | None = None  # while the program has partitions
        self.has_waited: set[int] = set()  # partitions, for the kernel before this one
        self.regions: list[Region] = []
        self.barriers: list[Barrier] = []
        # What a partition has begun: only itself can wait for it.
        self.products: defaultdict[int, list[Product]] = defaultdict(list)
        self.stores: defaultdict[int, list[tuple[Descriptor, Sequence[Any], Shared]]] = defaultdict(
            list
        )
        self.gl = SimpleNamespace(
            constexpr=None, int64=torch.int64, float32=torch.float32,
            program_id=lambda axis: torch.tensor(number, dtype=torch.int32),
            num_programs=lambda axis: programs,
            static_range=range,
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            full=lambda shape, value, dtype, layout: torch.full(tuple(shape), value, dtype=dtype),
            static_assert=static_assert,
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            where=torch.where, exp=torch.exp, sqrt=torch.sqrt,
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            load=self.load, store=self.store,
            convert_layout=lambda x, layout: x,
            split=lambda x: x.unbind(-1),
            warp_specialize=self.warp_specialize,
            allocate_shared_memory=self.allocate,
            NVMMADistributedLayout=SimpleNamespace, DotOperandLayout=SimpleNamespace,
            BlockedLayout=lambda *_: None,
            SliceLayout=lambda *_: None,
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, count, pred=True: barrier.expect(count) if pred else None,
            arrive=self.arrive,
            wait=self.wait,
            invalidate=lambda barrier: barrier.invalidate(),
        )
        self.tma = SimpleNamespace(store_wait=self.store_wait)

    def names(self) -> dict[str, Any]:
        own = "gl", "mbarrier", "tma", "async_load", "async_store", "fence_async_shared", "gdc_wait"
        own += "warpgroup_mma", "warpgroup_mma_init", "warpgroup_mma_wait"
        others = {"tl": self.gl, "barrier": lambda: None}
        return {name: getattr(self, name) for name in own} | others

    @property
    def me(self) -> int:
        """The partition that runs."""
        return self.turns.running if self.turns else 0

    def warp_specialize(self, partitions: Sequence[tuple[Callable, Sequence]], **_: Any) -> None:
        calls = [functools.partial(function, *arguments) for function, arguments in partitions]
        self.turns = Turns(calls, self.order)
        self.turns.run()
        self.turns = None

    def arrive(self, barrier: Barrier, pred: Any = True) -> None:
        if pred:
            barrier.arrive()
            if self.turns:
                self.turns.wait(lambda: True)

    def wait(self, barrier: Barrier, phase: Any) -> None:
        if self.turns:
            self.turns.wait(lambda: barrier.is_over(phase), "each partition waits for another")
        elif not barrier.is_over(phase):
            found, wanted = barrier.bytes(), barrier.expected
            raise HangError(f"{found} bytes arrive where {wanted} are expected")

    def gdc_wait(self) -> None:
        self.has_waited.add(self.me)

    def check_read(self, memory: Tensor) -> None:
        if self.newer and memory.data_ptr() in self.newer and self.me not in self.has_waited:
            raise RaceError("a tensor is read while the kernel before may still write it")

    def check_store(self) -> None:
        if self.newer is not None and self.me not in self.has_waited:
            raise RaceError("a tensor is stored while the kernel before may still use its memory")

    def load(self, pointer: Pointer, mask: Tensor, other: float) -> Tensor:
        self.check_read(pointer.memory.values)
        return pointer.load(mask, other)

    def store(self, pointer: Pointer, value: Tensor, mask: Tensor) -> None:
        self.check_store()
        pointer.store(value, mask)

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout is Barrier:
            barriers = [Barrier() for _ in range(shape[0])]
            self.barriers += barriers
            return SimpleNamespace(index=lambda i: barriers[checked(i)])
        regions = [Region() for _ in range(shape[0])]
        self.regions += regions
        return Shared(torch.full(tuple(shape), torch.nan, dtype=dtype), regions)

    def async_load(
        self, desc: Descriptor, coord: Sequence[Any], barrier: Barrier, target: Shared, pred=True
    ) -> None:
        if not pred:
            return
        self.check_read(desc.base)
        [region] = target.regions
        region.before_write()
        region.loading = True
        target.values.fill_(torch.nan)
        barrier.copies.append((target, desc.load(coord)))

    def async_store(self, desc: Descriptor, coord: Sequence[Any], source: Shared) -> None:
        self.check_store()
        [region] = source.regions
        region.before_async_read()
        region.readers.add(desc)
        self.stores[self.me].append((desc, coord, source))

    def store_wait(self, pendings: int) -> None:
        stores = self.stores[self.me]
        while len(stores) > pendings:
            desc, coord, source = stores.pop(0)
            desc.store(coord, source.values)
            source.regions[0].readers.remove(desc)

    def fence_async_shared(self) -> None:
        for region in self.regions:
            region.unfenced = False

    def warpgroup_mma_init(self, value: Tensor) -> Product:
        return Product(value, [])

    def warpgroup_mma(
        self, a: Shared | Tensor, b: Shared, acc: Any, *, use_acc=True, is_async: bool
    ) -> Product:
        """``a`` is in shared memory or in registers."""
        assert is_async
        regions, factor = (a.regions, a.values) if isinstance(a, Shared) else ([], a)
        regions = [*regions, *b.regions]
        before = acc.value if isinstance(acc, Product) else acc
        product = Product(factor.float() @ b.values.float(), regions)
        assert product.value.shape == before.shape
        product.value += before if use_acc else 0
        for region in regions:
            region.before_async_read()
            region.readers.add(product)
        self.products[self.me].append(product)
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Any]) -> Any:
        products = self.products[self.me]
        while len(products) > outstanding:
            product = products.pop(0)
            for region in product.regions:
                region.readers.discard(product)
        [product] = deps
        return product if product in products else product.value

    def end(self) -> None:
        """Raise ``RaceError`` if something is still in flight."""
        begun = *self.stores.values(), *self.products.values()
        if any(begun) or any(barrier.copies for barrier in self.barriers):
            raise RaceError("something is in flight at the end of the program")


def simulate(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    tile: Tile,
    edit: tuple[str, str] | None = None,
    order: Sequence[int] = (0, 1, 2),
    newer: Sequence[Tensor] | None = None,
) -> None:
    """Run all programs of a kernel, the last one first.

    Args:
        kernel: a function of ``@gluon.jit``.
        programs, arguments, constants, tile: of the launch.
        edit: text of the kernel's source, or of a function that it calls, and what to put in its
            place.
        order: which of the partitions of a program has precedence, see ``Turns``.
        newer: what the kernel before this one writes, if the two overlap.
    """
    constants = {**constants, **tile.meta, "num_warps": tile.num_warps}
    given = [_argument(argument) for argument in arguments]
    functions = _functions(kernel)
    sources = {name: _source(function) for name, function in functions.items()}
    if edit is not None:
        old, new = edit
        if sum(source.count(old) for source in sources.values()) != 1:
            raise ValueError(f"not once in the source: {old}")
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    around = {name: value for f in functions.values() for name, value in f.__globals__.items()}
    around = {n: v.value if isinstance(v, constexpr) else v for n, v in around.items()}
    for number in reversed(range(programs)):
        program = Program(number, programs, order, newer)
        names = around | program.names()
        for source in sources.values():
            exec(source, names)
        names[kernel.fn.__name__](*given, **constants)
        program.end()


def _argument(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Pointer(Global(argument))
    if hasattr(argument, "block_shape"):
        return Descriptor(argument.base, argument.block_shape)
    return argument


def _functions(jit: Any) -> dict[str, Any]:
    """The Python functions of a kernel and of all that it calls, by name."""
    found, left = {}, [jit]
    while left:
        function = left.pop().fn
        if function.__name__ not in found:
            found[function.__name__] = function
            called = (function.__globals__.get(name) for name in function.__code__.co_names)
            left += (value for value in called if hasattr(value, "fn"))
    return found


def _source(function: Any) -> str:
    """Without decorators, and with annotations that nobody evaluates."""
    source = textwrap.dedent(inspect.getsource(function))
    return "from __future__ import annotations\n" + source[source.index("def ") :]
