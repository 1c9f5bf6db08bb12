"""Start kernels by Triton, and what it takes to start a compiled kernel again without Triton.

Triton compiles a kernel for its constants and for traits of its arguments: their types, which
integers are 1 or multiples of 16, which pointers are aligned. At every launch it finds these traits
anew, which takes most of a launch. Code that knows that a launch has the traits of an earlier one,
as a ``tape.Tape`` does, can start the same compiled kernel. Then nobody checks whether a kernel's
source or global variables have changed, or whether a pointer is one of the GPU.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# How a compiled kernel starts is private to Triton, and was read in these versions.
READ_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_IS_READ = torch.version.hip is None and triton.__version__.startswith(READ_VERSIONS)
_RUN = JITFunction.run


class Ready(NamedTuple):
    """A loaded kernel, how it starts, with what options, and its last arguments, the constants.

    ``run(x, y, z, stream, *options, *arguments, *constants)`` starts a grid of x * y * z programs.
    """

    compiled: CompiledKernel
    run: Callable[..., None]
    options: tuple
    constants: tuple


# Is told of each launch: the kernel, how it starts again or None, its grid and its arguments.
Note = Callable[[Any, Ready | None, tuple[int, ...], Sequence], None]
_NOTE: ContextVar[Note | None] = ContextVar("_NOTE", default=None)


@contextlib.contextmanager
def noting(note: Note) -> Iterator[None]:
    """In this context ``note`` is told of each launch."""
    token = _NOTE.set(note)
    try:
        yield
    finally:
        _NOTE.reset(token)


def is_noted() -> bool:
    """Whether somebody is told of launches: a tape is being made."""
    return _NOTE.get() is not None


def start(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence, keywords: Mapping[str, Any]
) -> None:
    """Have Triton launch a kernel on the current device.

    Args:
        kernel: a function of ``@triton.jit`` or ``@gluon.jit``.
        grid: of one to three axes.
        arguments: all before the constants; tensors must be on the current device.
        keywords: the constants and Triton's options.
    """
    compiled = kernel[grid](*arguments, **keywords)
    if note := _NOTE.get():
        note(kernel, ready(kernel, compiled, len(arguments), keywords), grid, arguments)


def ready(kernel: Any, compiled: Any, count: int, keywords: Mapping[str, Any]) -> Ready | None:
    """How a kernel starts that was just launched with ``count`` arguments before its constants.

    None if nobody knows: it is compiled in the background, say, or a constant has its default.
    """
    if type(compiled) is not CompiledKernel or not _is_usual(kernel):
        return None
    constants = list(inspect.signature(kernel.fn).parameters)[count:]
    if not keywords.keys() >= set(constants):
        return None
    without_hooks = None, None, None  # nor what a hook is told
    options = compiled.function, compiled.packed_metadata, *without_hooks
    return Ready(compiled, compiled.run, options, tuple(keywords[name] for name in constants))


def has_fast_way(device: torch.device) -> bool:
    """Whether a kernel can start again on this device. AMD's depend on more traits."""
    return device.type == "cuda" and _IS_READ


def is_watched() -> bool:
    """Whether a profiler, a debugger, or a test watches or changes all launches."""
    runtime = knobs.runtime
    return (
        JITFunction.run is not _RUN
        or getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.add_stages_inspection_hook is not None
    )


def _is_usual(kernel: Any) -> bool:
    """Whether nobody watches or changes a kernel's launches."""
    return (
        isinstance(kernel, JITFunction)  # the interpreter's functions are not
        and (type(kernel) is JITFunction or kernel.is_gluon())
        and not kernel.pre_run_hooks
        and not is_watched()
    )


def settings() -> tuple:
    """What decides a kernel, and is no argument of it: the current device, and Triton's knobs."""
    compilation = knobs.compilation
    return (
        triton.runtime.driver.active.get_current_device(), knobs.runtime.debug,
        compilation.instrumentation_mode, getattr(compilation, "fpsan_homomorphic_casts", None),
    )  # fmt: skip


def is_descriptor(value: object) -> bool:
    """Whether it is Triton's tensor descriptor, or Gluon's."""
    kind = type(value)
    return kind is TensorDescriptor or kind.__name__ == TensorDescriptor.__name__
