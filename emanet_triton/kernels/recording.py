"""What a launcher of kernels does in a call: operations of PyTorch, and launches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emanet_triton.errors import describe
from emanet_triton.kernels.relaunch import Ready, is_descriptor

_ATEN = torch.ops.aten
_ALLOCATIONS = {
    _ATEN.empty.memory_format, _ATEN.empty_like.default, _ATEN.new_empty.default,
}  # fmt: skip
_NUMBERS = {int, float, bool, type(None)}


class Untapable(Exception):  # noqa: N818 (the launcher runs as usual: it is not an error)
    """A launcher did what a tape cannot repeat."""


class Layout(NamedTuple):
    """How a tensor's elements lie in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def num_bytes(self) -> int:
        """From the first to the last element."""
        steps = zip(self.shape, self.stride, strict=True)
        return (1 + sum((n - 1) * step for n, step in steps)) * self.dtype.itemsize


class Place(NamedTuple):
    """Where a tensor begins.

    Attributes:
        slot: which tensor has its memory: first the launcher's arguments, then what it makes.
        offset: bytes from that tensor's address.
    """

    slot: int
    offset: int


class View(NamedTuple):
    """A tensor that an operation of PyTorch takes, or that the launcher returns.

    Attributes:
        place: where it begins.
        layout: its own.
        is_whole: whether it has the layout of the tensor that has its memory, and begins with it.
    """

    place: Place
    layout: Layout
    is_whole: bool

    def of(self, root: Tensor) -> Tensor:
        """The view of the tensor that has its memory."""
        if self.is_whole:
            return root
        offset = root.storage_offset() + self.place.offset // root.element_size()
        return root.as_strided(self.layout.shape, self.layout.stride, offset)


class Operation(NamedTuple):
    """An operation of PyTorch that makes a tensor.

    Attributes:
        function: the operation.
        arguments: by position; a ``View`` stands for a tensor.
        keywords: by name.
        slot: of the tensor that it makes.
    """

    function: Callable[..., Tensor]
    arguments: list[Any]
    keywords: dict[str, Any]
    slot: int

    def run(self, roots: dict[int, Tensor]) -> Tensor:
        arguments = [a.of(roots[a.place.slot]) if type(a) is View else a for a in self.arguments]
        return self.function(*arguments, **self.keywords)


class Launch(NamedTuple):
    """A launch.

    Attributes:
        run: starts the compiled kernel, with the grid, the stream and then ``values``.
        grid: numbers of programs.
        values: options, arguments, constants; anything in place of pointers and descriptors.
        pointers: number and place of each value that is one.
        descriptors: number, place, type and other fields of each value that is one.
        compiled: the kernel, held because Triton unloads the code of a kernel that nobody holds.
    """

    run: Callable[..., None]
    grid: tuple[int, int, int]
    values: list[Any]
    pointers: list[tuple[int, Place]]
    descriptors: list[tuple[int, Place, type, dict[str, Any]]]
    compiled: object


class Address:
    """Stands for the tensor that a descriptor describes."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


class Recorder(TorchDispatchMode):
    """Within, notes PyTorch's operations and the launches of a launcher.

    Args:
        inputs: the launcher's tensors, all different objects.

    Attributes:
        steps: what it did, in order.
        kernels: that it launched, by id, since a kernel's own hash is slow.
        layouts: by slot.
        allocated: slots of tensors that an allocation alone has made.
        problem: the first thing that a tape cannot repeat, or None.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Operation | Launch] = []
        self.kernels: dict[int, Any] = {}
        self.layouts: list[Layout] = []
        self.allocated: list[int] = []
        self.problem: str | None = None
        # By id; with the tensor, so that no other gets its id.
        self._places: dict[int, tuple[Tensor, Place]] = {}
        self._device = inputs[0].device
        for tensor in inputs:
            self._put(tensor)

    def view(self, tensor: Tensor) -> View:
        """Where a tensor lies.

        Raises:
            Untapable: nobody knows.
        """
        _, place = self._places.get(id(tensor), (None, None))
        if place is None:
            raise Untapable("a tensor comes from elsewhere")
        layout = Layout.of(tensor)
        return View(place, layout, place.offset == 0 and layout == self.layouts[place.slot])

    def launch(self, *launched: Any) -> None:
        """Be told of a launch: see ``relaunch.Note``."""
        self._try(self._note_launch, *launched)

    def _dispatch(self, function, types, args=(), kwargs=None):
        keywords = kwargs or {}
        result = function(*args, **keywords)
        self._try(self._note_operation, function, args, keywords, result)
        return result

    def _try(self, note: Callable[..., None], *noted: Any) -> None:
        if self.problem is None:
            try:
                note(*noted)
            except Exception as problem:  # a new version of PyTorch or Triton may raise others
                self.problem = describe(problem)

    def _put(self, tensor: Tensor, place: Place | None = None) -> int:
        """Note where a tensor is; its slot. Without a place it has memory of its own."""
        if place is None:
            place = Place(len(self.layouts), 0)
            self.layouts.append(Layout.of(tensor))
        self._places[id(tensor)] = tensor, place
        return place.slot

    def _note_operation(
        self, function: Any, args: tuple, keywords: dict[str, Any], result: Any
    ) -> None:
        outputs = result if isinstance(result, (list, tuple)) else [result]
        given = [a for a in args if isinstance(a, Tensor)]
        if function._schema.is_mutable or not all(isinstance(t, Tensor) for t in outputs):
            raise Untapable(f"{function} changes a tensor, or makes none")
        if len(given) != sum(isinstance(a, Tensor) for a in tree_leaves((args, keywords))):
            raise Untapable(f"{function} takes a list of tensors, or one by name")
        if torch.Tag.dynamic_output_shape in function.tags:
            raise Untapable(f"the shape that {function} makes depends on values")
        # Of several tensors in one memory an operation returns a view of the first.
        roots = {t.untyped_storage()._cdata: t for t in reversed(given)}
        for output in outputs:
            root = roots.get(output.untyped_storage()._cdata)
            if root is not None:
                if root.dtype != output.dtype:
                    raise Untapable(f"{function} gives bytes another dtype")
                slot, offset = self.view(root).place
                elements = output.storage_offset() - root.storage_offset()
                self._put(output, Place(slot, offset + elements * root.element_size()))
            elif output.device != self._device:
                raise Untapable(f"{function} makes a tensor on {output.device}")
            elif function in _ALLOCATIONS:
                self.allocated.append(self._put(output))
            elif len(outputs) > 1:
                raise Untapable(f"{function} makes several tensors")
            else:
                arguments = [self.view(a) if isinstance(a, Tensor) else a for a in args]
                slots = {a.place.slot for a in arguments if isinstance(a, View)}
                if slots.intersection(self.allocated):
                    raise Untapable(f"{function} reads memory that the launcher allocated")
                slot = self._put(output)
                self.steps.append(Operation(function, arguments, keywords, slot))

    def _note_launch(
        self, kernel: Any, ready: Ready | None, grid: tuple[int, ...], arguments: Sequence
    ) -> None:
        if ready is None:
            raise Untapable("a launch is Triton's own")
        pointers, descriptors = [], []
        values = [*ready.options, *arguments, *ready.constants]
        for i, argument in enumerate(arguments, len(ready.options)):
            if isinstance(argument, Tensor):
                pointers.append((i, self.view(argument).place))
            elif is_descriptor(argument):
                fields = dict(vars(argument))
                place = self.view(fields.pop("base")).place
                descriptors.append((i, place, type(argument), fields))
            elif type(argument) not in _NUMBERS:
                raise Untapable(f"a launch takes a {type(argument).__name__}")
            else:
                continue
            values[i] = None  # lest the tape keeps a tensor
        x, y, z = (*grid, 1, 1)[:3]
        launch = Launch(ready.run, (x, y, z), values, pointers, descriptors, ready.compiled)
        self.steps.append(launch)
        self.kernels[id(kernel)] = kernel


# Set here, since PyTorch wraps a method of the class: its first call would import the compiler.
Recorder.__torch_dispatch__ = Recorder._dispatch  # type: ignore[method-assign, assignment]
