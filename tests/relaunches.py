"""Launch kernels again and again on pretended GPUs, and say what ran and when Triton searched.

    python tests/relaunches.py

Run as a process of its own, since it needs Triton's compiler in place of the interpreter. It
prints JSON: the name of each scene below, and what it returns.
"""

import itertools
import json
import statistics
import sys
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.bench.ahead_of_time.gates import Compiler
from emanet_triton.kernels import launch, relaunch
from emanet_triton.kernels.conv import expand_reduce, hopper, implicit_gemm
from emanet_triton.kernels.em import attention, block
from emanet_triton.kernels.tile import Tile

CPU = torch.device("cpu")
TILE = Tile("scale", "sm_90", "fp32", {"BLOCK": 128}, 4, 1)
SMALL = 6  # a device that has no memory for any kernel


@triton.jit
def scale(x_ptr, y_ptr, out_ptr, n, factor, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    """out = factor * x + y"""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_out = tl.load(x_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32) * factor
    if HAS_Y:
        b_out += tl.load(y_ptr + o_n, mask=o_n < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_n, b_out.to(out_ptr.dtype.element_ty), mask=o_n < n)


class Gpu(Compiler):
    """A driver that notes the launches, each with the number of the loaded kernel."""

    def __init__(self) -> None:
        super().__init__("sm_90")
        self.launches: list[tuple] = []
        self.device, self.stream = 0, 0
        numbers = itertools.count()
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": -1 if device == SMALL else 232_448
            },
            load_binary=lambda *_: (object(), next(numbers), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            for hook in (enter, leave):
                if hook is not None:
                    hook(launch_metadata)
            arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
            self.launches.append((metadata.name, (x, y, z), stream, function, arguments))

        return run


GPU = Gpu()
X = torch.ones(256)
OUT = torch.ones(256)


def launch_scale(x=X, y=X, out=OUT, n=200, factor=0.5, constant: int | None = None) -> None:
    has_y = y is not None if constant is None else constant
    launch.launch(scale, TILE, CPU, 2, x, y, out, n, factor, HAS_Y=has_y)


def searches(call: Callable[[], object]) -> int:
    """How often Triton searches for a kernel."""
    count = 0
    code = JITFunction.run.__code__

    def watch(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code is code

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def repeated() -> dict:
    launch_scale()
    GPU.stream = 5
    again = searches(launch_scale)
    GPU.stream = 0
    first, second = GPU.launches[-2:]
    same = [first[i] == second[i] for i in (0, 1, 3)]
    leading = [arguments[:5] for *_, arguments in (first, second)]
    return {
        "searches": again, "same": same, "streams": [first[2], second[2]],
        "arguments": leading[0] == leading[1] == [*(t.data_ptr() for t in (X, X, OUT)), 200, 0.5],
    }  # fmt: skip


VARIATIONS: dict[str, dict] = {
    "an unaligned pointer": {"x": X[1:]},
    "another unaligned pointer": {"out": OUT[1:]},
    "1": {"n": 1},
    "a multiple of 16": {"n": 192},
    "64 bits": {"n": 2**31},
    "64 bits, a multiple of 16": {"n": 2**32},
    "no tensor": {"y": None},
    "another dtype": {"x": X.half()},
    "an integer as factor": {"factor": 2},
    "1 as factor": {"factor": 1},
    "a constant": {"constant": False},
}


def varied() -> dict:
    """For each variation of a usual launch: searches of the first and second, and the kernel."""
    found = {}
    launch_scale()
    usual = GPU.launches[-1][3]
    for name, variation in VARIATIONS.items():
        counts = [searches(lambda v=variation: launch_scale(**v)) for _ in range(2)]
        kernels = [function for *_, function, _ in GPU.launches[-2:]]
        scale[(2,)](*_arguments(**variation), **TILE.keywords())
        kernels.append(GPU.launches[-1][3])
        found[name] = {"searches": counts, "kernels": kernels, "usual": usual}
    return found


def _arguments(x=X, y=X, out=OUT, n=200, factor=0.5, constant=None) -> tuple:
    return x, y, out, n, factor, y is not None if constant is None else constant


def on_another_device() -> dict:
    launch_scale()
    GPU.device = 3
    counts = [searches(launch_scale) for _ in range(2)]
    GPU.device = 0
    return {"searches": counts, "kernels": [launch[3] for launch in GPU.launches[-3:]]}


def watched() -> dict:
    """A launch that somebody watches is Triton's own, and the watcher sees it."""
    seen: list[str] = []
    counts = {}
    launch_scale()
    runtime = knobs.runtime
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(runtime, name)
        note = lambda metadata, name=name: seen.append(f"{name} {metadata.get()['name']}")  # noqa: E731
        hook.add(note)
        counts[name] = searches(launch_scale)
        hook.remove(note)
    scale.add_pre_run_hook(lambda *_, **__: seen.append("pre_run_hook"))
    counts["pre_run_hook"] = searches(launch_scale)
    scale.pre_run_hooks.clear()
    run = JITFunction.run
    JITFunction.run = lambda self, *_, **__: seen.append(f"run {self.__name__}")
    launch_scale()
    JITFunction.run = run
    runtime.debug = True
    counts["debug"] = searches(launch_scale)
    runtime.debug = False
    return {"seen": seen, "searches": counts, "afterwards": searches(launch_scale)}


def unknown() -> dict:
    """What is not known takes Triton's own way, each time."""
    launch_scale()
    wrapped = triton.reinterpret(X, tl.float32)
    counts = {"type": [searches(lambda: launch_scale(x=wrapped)) for _ in range(2)]}
    relaunch._IS_READ = False
    relaunch.has_fast_way = has_fast_way
    counts["version"] = [searches(launch_scale) for _ in range(2)]
    relaunch.has_fast_way = lambda device: True
    return counts


def without_memory() -> list[str]:
    GPU.device = SMALL
    raised = []
    for _ in range(2):
        try:
            launch_scale()
        except triton.OutOfResources as error:
            raised.append(str(error))
    GPU.device = 0
    return raised


def from_threads() -> bool:
    """Whether each launch of many threads gets the kernel of its own arguments."""
    sizes = [1, 16, 17, 160, 161, 2**31, 2**31 + 1]
    of_size = {}
    for n in sizes:
        launch_scale(n=n)
        of_size[n] = GPU.launches[-1][3]
    launches = len(GPU.launches)
    relaunch.MOST_KEYS, before = 3, relaunch.MOST_KEYS  # so that kernels are forgotten meanwhile
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: launch_scale(n=n), sizes * 100))
    relaunch.MOST_KEYS = before
    new = GPU.launches[launches:]
    return len(new) == 100 * len(sizes) and all(
        function == of_size[arguments[3]] for *_, function, arguments in new
    )


def operators() -> dict:
    """Operators of several kernels and of tensor descriptors: by Triton, then twice as usual.

    Times are those of one call without its checks, with a driver in Python that starts nothing.
    """
    torch.manual_seed(0)
    x, bases = torch.rand(1, 300, 64), torch.rand(1, 64, 8)
    weight, bias = torch.rand(64, 64), torch.rand(64)
    image, wide = (torch.rand(1, channels, 8, 16, dtype=torch.float16) for channels in (64, 256))
    weights = [torch.rand(*shape, 1, 1, dtype=torch.float16) for shape in ((256, 64), (64, 256))]
    biases = [torch.rand(len(w), dtype=torch.float16) for w in weights]
    half = torch.rand(1, 300, 512).half(), torch.rand(1, 512, 8).half()
    layer = torch.rand(512, 512).half(), torch.rand(512).half()
    calls = {
        "conv_bias_act": lambda: implicit_gemm.conv_bias_act(
            image, weights[0], biases[0], wide, 1, 1, True, torch.float16, "ieee"
        ),
        "conv_bias_act_in_gluon": lambda: hopper.conv_bias_act(
            image, weights[0], biases[0], wide, 1, 1, True, torch.float16, "ieee"
        ),
        "expand_reduce": lambda: expand_reduce.expand_reduce(image, weights, biases, wide),
        "em_attention": lambda: attention.run_attention(x, bases, 3, 0.0, "tf32"),
        "em_attention_in_one_pass": lambda: attention.run_attention(*half, 2, 0.0, "ieee", 16),
        "em_attention_block": lambda: block.run_block(
            x, bases, weight, bias, weight, bias, 3, 0.0, False, "tf32"
        ),
        "em_attention_block_in_one_pass": lambda: block.run_block(
            *half, *layer, *layer, 3, 0.0, False, "ieee", 16
        ),
    }
    found = {}
    for name, call in calls.items():
        runs, counts = [], []
        for is_fast in (False, True, True):
            relaunch.has_fast_way = lambda device, is_fast=is_fast: is_fast
            first = len(GPU.launches)
            counts.append(searches(call))
            runs.append([(*r[:4], [_shown(a) for a in r[4]]) for r in GPU.launches[first:]])
        found[name] = {
            "kernels": [launched[0] for launched in runs[0]],
            "same": runs[0] == runs[1] == runs[2],
            "searches": counts,
            "microseconds": _times(call),
        }
    return found


def _times(call: Callable[[], object]) -> dict[str, float]:
    """Medians of the host's time for a call, all launches by Triton or again by our key."""
    times = {}
    for way in ("triton", "again"):
        relaunch.has_fast_way = lambda device, way=way: way == "again"
        each = timeit.repeat(call, number=1, repeat=201)
        times[way] = round(1e6 * statistics.median(each), 1)
    return times


def _shown(argument: object) -> object:
    """What of an argument is the same in every call: all but the address."""
    if isinstance(argument, (TensorDescriptor, GluonDescriptor)):
        return [*argument.shape], [*argument.strides], argument.block_shape
    return "pointer" if isinstance(argument, int) and argument > 2**32 else argument


def main() -> None:
    triton.runtime.driver.set_active(GPU)
    relaunch.has_fast_way = lambda device: True
    scenes = (
        repeated, varied, on_another_device, watched, unknown, without_memory, from_threads,
        operators,
    )  # fmt: skip
    json.dump({scene.__name__: scene() for scene in scenes}, sys.stdout)


has_fast_way = relaunch.has_fast_way

if __name__ == "__main__":
    main()
