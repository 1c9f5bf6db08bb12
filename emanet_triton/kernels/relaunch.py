"""Launch a compiled kernel again without Triton's search for it, which takes most of a launch.

Triton compiles a kernel for its constants and for traits of its arguments: their types, which
integers are 1 or multiples of 16, which pointers are aligned. At every launch it finds these traits
anew. A ``Launcher`` finds the kernel by a key that implies them. A launch that a hook of Triton
watches, as its profiler does, takes Triton's own way.

After the first launch nobody checks whether a kernel's source or global variables have changed, or
whether a pointer is one of the GPU: the operators check their tensors.
"""

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.kernels.tile import Tile

# How a compiled kernel starts is private to Triton, and was read in these versions.
READ_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
ALIGNMENT = 16  # bytes of a pointer that Triton calls aligned
MOST_KEYS = 1024  # of a launcher: every image size adds some
_IS_READ = torch.version.hip is None and triton.__version__.startswith(READ_VERSIONS)
_RUN = JITFunction.run
_TENSORS = frozenset({Tensor, torch.nn.Parameter})

_LAUNCHERS: dict[Hashable, "Launcher"] = {}


class Launcher:
    """A kernel with its constants: ``kernel[grid](*arguments, **keywords)``, but faster again.

    Args:
        kernel: a function of ``@triton.jit``.
        keywords: its constants and Triton's options.
    """

    def __init__(self, kernel: Any, keywords: Mapping[str, Any]) -> None:
        self.kernel = kernel
        self.keywords = keywords
        # Key → a loaded kernel, how to start it, with what options, and its last arguments, the
        # constants.
        self._ready: dict[Hashable, tuple[CompiledKernel, Callable, tuple, tuple]] = {}

    def __call__(self, device: torch.device, grid: tuple[int, ...], arguments: Sequence) -> None:
        """Launch a grid of one to three axes on the current device, where the arguments are."""
        key = None
        if has_fast_way(device) and _is_usual(self.kernel):
            driver = triton.runtime.driver.active
            current = driver.get_current_device()
            key, values = _key(current, arguments)
            if ready := self._ready.get(key):
                _, run, options, constants = ready
                x, y, z = (*grid, 1, 1)[:3]
                run(x, y, z, driver.get_current_stream(current), *options, *values, *constants)
                return
        compiled = self.kernel[grid](*arguments, **self.keywords)
        if key is not None:
            self._keep(key, compiled, len(arguments))

    def _keep(self, key: Hashable, compiled: Any, count: int) -> None:
        """Note a kernel that has just been launched with ``count`` arguments before constants."""
        constants = list(inspect.signature(self.kernel.fn).parameters)[count:]
        if type(compiled) is not CompiledKernel or not self.keywords.keys() >= set(constants):
            return  # it is compiled in the background, say, or a constant precedes an argument
        if len(self._ready) >= MOST_KEYS:
            self._ready.clear()
        without_hooks = None, None, None  # nor what a hook is told
        options = compiled.function, compiled.packed_metadata, *without_hooks
        values = tuple(self.keywords[name] for name in constants)
        self._ready[key] = compiled, compiled.run, options, values


def launcher(kernel: Any, constants: Mapping[str, Any], tile: Tile | None = None) -> Launcher:
    """The launcher of a kernel with these constants and options, and those of a tile.

    As in Triton, constants of 1 and True are the same kernel.
    """
    # A kernel is known by its id, since its own hash is slow; its launcher keeps it alive.
    key = id(kernel), tile, *constants, *constants.values()
    found = _LAUNCHERS.get(key)
    if found is None:
        found = Launcher(kernel, {**constants, **(tile.keywords() if tile else {})})
        found = _LAUNCHERS.setdefault(key, found)
    return found


def has_fast_way(device: torch.device) -> bool:
    """Whether a kernel can be launched again on this device. AMD's depend on more traits."""
    return device.type == "cuda" and _IS_READ


def _is_usual(kernel: Any) -> bool:
    """Whether nobody watches or changes launches: a profiler, a debugger, or a test."""
    runtime = knobs.runtime
    return (
        JITFunction.run is _RUN
        and isinstance(kernel, JITFunction)  # the interpreter's functions are not
        and (type(kernel) is JITFunction or kernel.is_gluon())
        and not kernel.pre_run_hooks
        and not getattr(runtime.launch_enter_hook, "calls", True)
        and not getattr(runtime.launch_exit_hook, "calls", True)
        and runtime.add_stages_inspection_hook is None
    )


def _key(device: int, arguments: Sequence[Any]) -> tuple[Hashable | None, list[Any]]:
    """What decides the kernel beside its constants, or None if unknown; the arguments to start.

    An integer enters the key as it is: Triton makes other kernels for 1, for multiples of 16 and
    for more than 32 bits. A bool has its type before it, because True equals 1. Of a float only the
    type matters to Triton.
    """
    compilation = knobs.compilation
    key = [
        device, knobs.runtime.debug, compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
    ]  # fmt: skip
    values = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            key.append(argument)
            values.append(argument)
        elif kind in _TENSORS:
            pointer = argument.data_ptr()
            key.append(argument.dtype)
            key.append(pointer % ALIGNMENT == 0)
            values.append(pointer)  # faster than the tensor, which the caller keeps alive
        elif kind is float:
            key.append(kind)
            values.append(argument)
        elif kind is bool or argument is None:
            key += kind, argument
            values.append(argument)
        elif kind is TensorDescriptor or kind.__name__ == TensorDescriptor.__name__:  # Gluon's own
            key += (
                kind, argument.base.dtype, argument.padding, getattr(argument, "layout", None),
                getattr(argument, "round_f32_to_tf32", False),
            )  # fmt: skip
            for numbers in (argument.shape, argument.strides, argument.block_shape):
                key += numbers
            values.append(argument)
        else:
            return None, []
    return tuple(key), values
