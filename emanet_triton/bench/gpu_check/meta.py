"""Operator calls on tensors without data: find the kernels that they launch, and compile these.

The operators' own launchers run on the meta device, under a driver that names a GPU and launches
nothing. So Triton reads, or writes, the same cache entries as the real launches.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from emanet_triton.bench.ahead_of_time.gates import TARGETS, Compiler
from emanet_triton.bench.suites.conv_expand_reduce import Pair
from emanet_triton.bench.walk import OperatorCall
from emanet_triton.errors import describe
from emanet_triton.kernels.conv import expand_reduce as conv_expand_reduce
from emanet_triton.kernels.conv import hopper as conv_hopper
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.device import gpu_arch
from emanet_triton.kernels.em import attention as em_attention
from emanet_triton.kernels.em import block as em_block
from emanet_triton.kernels.em import tiles as em_tiles
from emanet_triton.kernels.launch import fitting
from emanet_triton.kernels.pool import max_pool as pool_triton
from emanet_triton.kernels.resample import gather as resample_triton
from emanet_triton.kernels.tile import Tile


class Gpu(NamedTuple):
    """A GPU that kernels are compiled for.

    Attributes:
        arch: name of its tile table.
        target: Triton's name of it.
    """

    arch: str
    target: GPUTarget

    @classmethod
    def of_arch(cls, arch: str) -> "Gpu":
        return cls(arch, TARGETS[arch])

    @classmethod
    def here(cls) -> "Gpu":
        """The GPU that PyTorch finds."""
        arch = gpu_arch(torch.device("cuda"))
        if torch.version.hip:
            return cls.of_arch(arch)
        major, minor = torch.cuda.get_device_capability()
        return cls(arch, GPUTarget("cuda", 10 * major + minor, 32))


@dataclass(frozen=True)
class Launch:
    """A call of an operator by Triton's kernels.

    Attributes:
        call: which.
        tile: of one of its kernels, if it is not the shipped one.
    """

    call: OperatorCall
    tile: Tile | None = None


class KernelKey(NamedTuple):
    """A kernel as compiled for some arguments: its name, and its key in Triton's cache."""

    name: str
    key: str


class Compiled(NamedTuple):
    """The result of compiling a kernel.

    Attributes:
        kernel: its name.
        hit: whether it was in Triton's cache.
        error: why it does not compile; empty if it does.
    """

    kernel: str
    hit: bool
    error: str = ""


class _Driver(Compiler):
    """Stands for a GPU, which need not have a tile table of its own."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu.arch)
        self._target = gpu.target

    def get_current_target(self) -> GPUTarget:
        return self._target


def kernels_of(launch: Launch, gpu: Gpu) -> list[KernelKey]:
    """The kernels that a call launches, in order; nothing is compiled."""
    found: list[KernelKey] = []

    def note(*, key: str, fn: Any, **_: object) -> bool:
        found.append(KernelKey(fn.name, str(key)))
        return True  # so that Triton goes no further

    with _compile_only(gpu), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        run_on_meta(launch, gpu.arch)
    return found


def compile_kernels(
    launch: Launch, gpu: Gpu, wanted: Collection[KernelKey] | None = None
) -> tuple[list[Compiled], list[CompiledKernel]]:
    """Compile the kernels that a call launches, or find them in Triton's cache.

    Args:
        launch: the call.
        gpu: what the kernels are compiled for.
        wanted: which of the call's kernels; by default all.

    Returns:
        The result of each kernel that no earlier launch had; and these kernels, or without
        ``wanted`` all kernels of the call.
    """
    results: list[Compiled] = []
    kernels: list[CompiledKernel] = []
    hits: list[bool] = []
    run = JITFunction.run

    def skip(*, key: str, fn: Any, **_: object) -> bool:
        return wanted is not None and KernelKey(fn.name, str(key)) not in wanted

    def compile_one(self, *args, grid, warmup, **kwargs) -> None:
        hits.clear()
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever the compiler raises
            results.append(Compiled(self.__name__, False, describe(error)))
            return
        if hits:  # else it is not wanted, or an earlier launch had it
            results.append(Compiled(self.__name__, hits[0]))
        if (hits or wanted is None) and kernel not in kernels:
            kernels.append(kernel)

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    with (
        _compile_only(gpu, compile_one),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", skip),
        mock.patch.object(triton.knobs.compilation, "listener", listen),
    ):
        run_on_meta(launch, gpu.arch)
    return results, kernels


def run_on_meta(launch: Launch, arch: str) -> None:
    """Run the launcher of a call's kernels on tensors without data."""
    with (
        with_tile(launch.tile),
        mock.patch.object(em_attention, "gpu_arch", lambda device: arch),
    ):
        LAUNCHERS[launch.call.name](launch.call.values(), arch)


def has_kernel(call: OperatorCall) -> bool:
    """Whether a call has a kernel: ``expand_reduce`` has none for some channels and in float32."""
    return Pair.of(call).has_kernel if call.name == "expand_reduce" else call.name in LAUNCHERS


def shipped_tile(call: OperatorCall, gpu: Gpu, kernel: str = "") -> Tile:
    """The tile that the tables have for a kernel of a call, by default for its first one."""
    found: list[Tile] = []

    def noted(table: Callable[..., Tile]) -> Callable[..., Tile]:
        def note(*arguments: Any, **options: Any) -> Tile:
            found.append(table(*arguments, **options))
            return found[-1]

        return note

    with (
        mock.patch.object(conv_tiles, "tile", noted(conv_tiles.tile)),
        mock.patch.object(conv_tiles, "expand_reduce_tile", noted(conv_tiles.expand_reduce_tile)),
        mock.patch.object(em_tiles, "tile", noted(em_tiles.tile)),
    ):
        kernels_of(Launch(call), gpu)
    return next(tile for tile in found if kernel in ("", tile.kernel))


@contextlib.contextmanager
def _compile_only(gpu: Gpu, run: Callable[..., object] | None = None) -> Iterator[None]:
    """Within, launches go to ``run``; without it they end before Triton launches."""
    original = JITFunction.run

    def without_launch(self, *args, grid, warmup, **kwargs) -> object:
        return original(self, *args, grid=grid, warmup=True, **kwargs)

    hip = "a version" if gpu.target.backend == "hip" else None
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Driver(gpu)),
        mock.patch.object(JITFunction, "run", run or without_launch),
        mock.patch.object(torch.version, "hip", hip),
    ):
        yield


@contextlib.contextmanager
def with_tile(tile: Tile | None) -> Iterator[None]:
    """Within, the kernel of a tile runs with it, if one is given, and with no smaller one."""
    if tile is None:
        yield
        return

    def instead_of(table: Callable[..., Tile], kernel: str = "") -> Callable[..., Tile]:
        """A table of one kernel, or of the kernel that its first argument names."""

        def found(*arguments: Any, **options: Any) -> Tile:
            asked = kernel or arguments[0]
            return tile if asked == tile.kernel else table(*arguments, **options)

        return found

    def given(found: Tile, device: torch.device) -> Tile:
        return found if found.kernel == tile.kernel else fitting(found, device)

    pairs = instead_of(conv_tiles.expand_reduce_tile, "conv_expand_reduce")
    with (
        mock.patch.object(conv_tiles, "tile", instead_of(conv_tiles.tile)),
        mock.patch.object(conv_tiles, "expand_reduce_tile", pairs),
        mock.patch.object(em_tiles, "tile", instead_of(em_tiles.tile)),
        mock.patch.object(conv_triton, "fitting", given),
        mock.patch.object(conv_expand_reduce, "fitting", given),
        mock.patch.object(em_attention, "fitting", given),
    ):
        yield


def _without_backend(values: list[Any]) -> list[Any]:
    """The arguments of an operator's launcher: the last but one says who runs it."""
    return [*values[:-2], values[-1]]


def _convolutions(backend: str) -> ModuleType:
    return conv_hopper if backend == "gluon" else conv_triton


def _with_ranges(values: list[Any]) -> list[Any]:
    """The arguments of a launcher of EM attention: its last one stands for the backend."""
    return [*_without_backend(values), em_tiles.ONE_PASS.get(values[-2])]


# Name of an operator → runs its launcher, given the call's arguments and the tile table's name.
LAUNCHERS: dict[str, Callable[[list[Any], str], object]] = {
    "conv_bias_act": lambda values, arch: _convolutions(values[-2]).conv_bias_act(
        *[*_without_backend(values), arch]
    ),
    "expand_reduce": lambda values, arch: conv_expand_reduce.expand_reduce(*[*values[:4], arch]),
    "max_pool": lambda values, arch: pool_triton.max_pool(values[0], arch),
    "em_attention": lambda values, _: em_attention.run_attention(*_with_ranges(values)),
    "em_attention_block": lambda values, _: em_block.run_block(*_with_ranges(values)),
    "resample_labels": lambda values, _: resample_triton.resample(
        values[0], values[1:5], average=values[5], probabilities=False
    ),
    "resample_probabilities": lambda values, _: resample_triton.resample(
        values[0], values[1:5], average=values[5], probabilities=True
    ),
    "confusion_counts": lambda values, _: resample_triton.confusion(*values[:3]),
}
