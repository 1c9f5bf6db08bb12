"""Repeat what a launcher did for other tensors, without its Python and Triton's: a tape.

What a launcher of ours does depends on its options, on traits of its tensors (shapes, strides,
dtypes, the device, the last bits of addresses), and on Triton's settings. So one call's tape can be
played for all tensors of the same traits: it allocates the same memory, runs the same operations of
PyTorch and starts the same kernels. Only the addresses differ. It has nothing to do with the tape
of automatic differentiation.

Making a tape takes longer than a call, so it is made at the second call of the same options and
traits, but not while a CUDA graph is recorded, whose replays need no tape. Where launches take
Triton's own way (see ``relaunch``), nothing is taped or played.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from emanet_triton.errors import describe
from emanet_triton.kernels import relaunch
from emanet_triton.kernels.checks import ALIGNMENT
from emanet_triton.kernels.device import is_capturing
from emanet_triton.kernels.launch import cdiv, replacements
from emanet_triton.kernels.recording import Address, Operation, Recorder

F = TypeVar("F", bound=Callable)
Outputs = Tensor | tuple[Tensor | None, ...]

MOST_TAPES = 4096  # of a launcher: an image size adds one for each kind of layer
FIRST_CALL = "the second call makes it"
PIECE = 256  # bytes; a tensor of the workspace begins at a multiple of it
_TENSORS = {Tensor, torch.nn.Parameter}
_SEQUENCES = {list, tuple}


class Tape:
    """The steps of a launcher, for tensors of the traits that it was recorded with.

    Args:
        recorder: has noted the steps.
        outputs: what the launcher returned.

    Attributes:
        kernels: that it launches.

    Raises:
        Untapable: an output comes from elsewhere.
    """

    def __init__(self, recorder: Recorder, outputs: Outputs) -> None:
        self.kernels = tuple(recorder.kernels.values())
        self._steps = recorder.steps
        self._is_single = isinstance(outputs, Tensor)
        returned = (outputs,) if isinstance(outputs, Tensor) else outputs
        self._outputs = [None if tensor is None else recorder.view(tensor) for tensor in returned]
        allocated = {slot: recorder.layouts[slot] for slot in recorder.allocated}
        slots = [view.place.slot for view in self._outputs if view]
        for i, view in enumerate(self._outputs):
            if not view or slots.count(slot := view.place.slot) > 1 or slot not in allocated:
                continue
            # An output of as many bytes begins where its memory does.
            if allocated[slot].num_bytes() == view.layout.num_bytes():
                allocated[slot] = view.layout  # so that no view is made of it
                self._outputs[i] = view._replace(is_whole=True)
        # Outputs have memory of their own. All else that is allocated lies in one tensor.
        self._returned = [(slot, layout) for slot, layout in allocated.items() if slot in slots]
        self._workspace, self._bytes = [], 0
        for slot in allocated.keys() - slots:
            self._workspace.append((slot, self._bytes))
            self._bytes += cdiv(allocated[slot].num_bytes(), PIECE) * PIECE

    def play(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> Outputs:
        """Do the same with other tensors, which have these addresses."""
        device, empty = tensors[0].device, torch.empty_strided
        roots, starts = dict(enumerate(tensors)), dict(enumerate(addresses))
        if self._workspace:
            workspace = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            first = workspace.data_ptr()
            for slot, offset in self._workspace:
                starts[slot] = first + offset
        for slot, (shape, stride, dtype) in self._returned:
            root = roots[slot] = empty(shape, stride, dtype=dtype, device=device)
            starts[slot] = root.data_ptr()
        driver = triton.runtime.driver.active
        stream = driver.get_current_stream(driver.get_current_device())
        for step in self._steps:
            if isinstance(step, Operation):
                root = roots[step.slot] = step.run(roots)
                starts[step.slot] = root.data_ptr()
                continue
            run, (x, y, z), values, pointers, descriptors, _ = step
            values = values.copy()
            for i, (slot, offset) in pointers:
                values[i] = starts[slot] + offset
            for i, (slot, offset), kind, fields in descriptors:
                descriptor: Any = object.__new__(kind)
                descriptor.__dict__.update(fields, base=Address(starts[slot] + offset))
                values[i] = descriptor
            run(x, y, z, stream, *values)
        outputs = tuple(view and view.of(roots[view.place.slot]) for view in self._outputs)
        return cast(Outputs, outputs[0] if self._is_single else outputs)


def taped(launcher: F) -> F:
    """Play tapes of a launcher, which allocates, launches kernels, and is otherwise pure.

    It takes tensors, lists and tuples of them, and options; if one cannot be hashed, it runs as
    usual. It launches by ``relaunch.start`` alone, and returns a tensor, or several of which some
    may be None.
    """
    tapes: dict[Hashable, Tape | str] = {}  # a string for a reason why there is none

    @functools.wraps(launcher)
    def run(*arguments: Any, **keywords: Any) -> Any:
        found = _traits((*arguments, *keywords, *keywords.values()))
        if found is None:
            return launcher(*arguments, **keywords)
        key, tensors, addresses = found
        try:
            tape = tapes.get(key)
        except TypeError:
            return launcher(*arguments, **keywords)
        if type(tape) is Tape:
            if not any(kernel.pre_run_hooks for kernel in tape.kernels):
                return tape.play(tensors, addresses)
        elif tape is None:
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[key] = FIRST_CALL
        elif tape is FIRST_CALL and not is_capturing(tensors[0].device):
            tapes[key], outputs = _record(launcher, arguments, keywords)
            return outputs
        return launcher(*arguments, **keywords)

    return cast(F, run)


def _record(
    launcher: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]
) -> tuple[Tape | str, Any]:
    """Run a launcher: its tape, or the reason why there is none, and what it returned."""
    inputs: list[Tensor] = []
    arguments, names = _others(arguments, inputs), tuple(keywords)
    keywords = dict(zip(names, _others(tuple(keywords.values()), inputs), strict=True))
    recorder, before = Recorder(inputs), replacements()
    with relaunch.noting(recorder.launch), recorder:
        outputs = launcher(*arguments, **keywords)
    if recorder.problem or replacements() != before:
        return recorder.problem or "a smaller tile took the place of another", outputs
    try:
        return Tape(recorder, outputs), outputs
    except Exception as problem:  # a new version of PyTorch may raise other than Untapable
        return describe(problem), outputs


def _others(value: Any, tensors: list[Tensor]) -> Any:
    """The value, with another object for each tensor, added to ``tensors``.

    Two arguments may be one object, which would have two places.
    """
    if type(value) in _SEQUENCES:
        return type(value)(_others(v, tensors) for v in value)
    if not isinstance(value, Tensor):
        return value
    tensors.append(value.detach())
    return tensors[-1]


def _traits(arguments: Iterable) -> tuple[tuple, list[Tensor], list[int]] | None:
    """What decides a launcher's steps, its tensors and their addresses; None without tapes."""
    if relaunch.is_noted() or relaunch.is_watched():
        return None
    values: list[Any] = []
    for argument in arguments:
        if type(argument) in _SEQUENCES:
            values += len(argument), *argument
        else:
            values.append(argument)
    key: list[Any] = []
    tensors: list[Tensor] = []
    addresses: list[int] = []
    for value in values:
        kind = type(value)
        if kind in _TENSORS:
            address = value.data_ptr()
            key += value.shape, value.stride(), value.dtype, value.device, address % ALIGNMENT
            tensors.append(value)
            addresses.append(address)
        elif isinstance(value, (Tensor, list, tuple)):
            return None  # a class that may do something else; a sequence in a sequence
        else:
            key += kind, value  # True equals 1, and 1 equals 1.0
    if not tensors or not relaunch.has_fast_way(tensors[0].device):
        return None
    return (*relaunch.settings(), replacements(), *key), tensors, addresses
