"""A step: the kernels that take the networks longest, timed with several tiles each.

They are the costliest convolutions, the costliest pairs of 1x1 convolutions that one kernel
computes, the first convolution, and four kernels of the EM attention block. Each is a case of the
benchmark, and its tiles are the providers. The time of an EM kernel's tile is that of the whole
block. A tile gets no time if its result differs from the result of the shipped tile.
"""

import contextlib
import functools
import inspect
import itertools
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from emanet_triton.bench.ahead_of_time import code as compiled_code
from emanet_triton.bench.case import Absent, Case, worst
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.gpu_check import meta, own
from emanet_triton.bench.gpu_check.cases import EmCase
from emanet_triton.bench.gpu_check.conv_cases import ConvCase, ExpandReduceCase, case_of
from emanet_triton.bench.gpu_check.families import SIZE, SMALL, small_calls
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.gpu_check.rehearsal import Nowhere
from emanet_triton.bench.method import Method
from emanet_triton.bench.networks import MODES, NETWORKS
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Key, Row, write_csv
from emanet_triton.bench.run import Elsewhere
from emanet_triton.bench.suites.conv_layers import convolutions_of
from emanet_triton.bench.walk import OperatorCall, walk
from emanet_triton.kernels.conv import expand_reduce as conv_expand_reduce
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.kernels.em import block as em_block
from emanet_triton.kernels.launch import BLOCK_NAMES, TileReplaced
from emanet_triton.kernels.tile import Tile
from emanet_triton.models.network import logits_size

CONVOLUTIONS, PAIRS = 4, 3  # and one of ``conv_taps``
ROUNDS, SECONDS = 5, 10.0  # for the times of one case

# The arguments of a kernel's launcher, and the outputs that are wanted.
Problem = tuple[tuple[Any, ...], tuple[Tensor, ...]]

SIZE_NAMES = (*BLOCK_NAMES, "CHAINS")  # of the numbers in a tile's name, in their order
# Sizes in this order, warps, stages. Here BLOCK_M, BLOCK_O and BLOCK_C:
CANDIDATES = (
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3),
    (64, 256, 64, 4, 4),
    (128, 64, 64, 4, 5),
    (64, 128, 64, 4, 5),
)
# BLOCK_M, BLOCK_O:
TAPS_CANDIDATES = (
    (64, 32, 2, 1),
    (64, 32, 4, 1),
    (128, 32, 4, 1),
    (128, 32, 8, 1),
    (256, 32, 4, 1),
    (256, 32, 8, 1),
    (512, 32, 8, 1),
)
# BLOCK_M, BLOCK_O:
PAIR_CANDIDATES = (
    (128, 64, 8, 3),
    (128, 64, 8, 2),
    (128, 32, 8, 3),
    (128, 32, 8, 4),
    (128, 128, 8, 2),
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 4),
    (64, 32, 4, 2),
    (64, 128, 4, 2),
)
# The block's other kernels run once a call, or mostly add and copy.
EM_CANDIDATES = {
    "em_e_step": (  # BLOCK_N, BLOCK_C
        (128, 64, 4, 4),
        (128, 64, 8, 3),
        (128, 128, 4, 2),
        (128, 32, 4, 4),
        (64, 64, 4, 3),
        (64, 64, 4, 5),
        (256, 64, 8, 3),
    ),
    "em_m_step": (  # BLOCK_N, BLOCK_C
        (64, 64, 4, 3),
        (64, 64, 4, 5),
        (64, 128, 4, 4),
        (128, 64, 4, 3),
        (128, 128, 8, 3),
        (32, 64, 4, 4),
    ),
    "em_epilogue": (  # BLOCK_N, BLOCK_O, BLOCK_C
        (128, 128, 32, 4, 3),
        (128, 128, 64, 4, 3),
        (128, 256, 64, 8, 2),
        (128, 256, 32, 8, 3),
        (128, 256, 32, 8, 4),
        (64, 128, 32, 4, 4),
        (64, 256, 32, 4, 3),
    ),
    "em_project": (  # BLOCK_M, BLOCK_O, BLOCK_C, CHAINS
        (16, 32, 64, 1, 4, 4),
        (16, 32, 32, 2, 4, 4),
        (16, 32, 16, 4, 4, 3),
        (16, 32, 16, 4, 4, 5),
        (16, 32, 32, 4, 4, 3),
        (16, 32, 16, 8, 8, 3),
        (16, 64, 16, 4, 4, 4),
        (16, 16, 16, 4, 4, 4),
    ),
}


class Swept(NamedTuple):
    """A kernel whose tiles are timed.

    Attributes:
        case: the call that launches it.
        uses: how often R50 and R101 make this call, on a whole image and on sliding windows.
        kernel: its name in the EM attention block; empty for a convolution or a pair, which is one
            kernel.
    """

    case: ConvCase | ExpandReduceCase | EmCase
    uses: int
    kernel: str = ""

    @property
    def call(self) -> OperatorCall:
        (call,) = self.case.calls()
        return call

    @property
    def name(self) -> str:
        if isinstance(self.case, EmCase):
            return f"{self.case.name} {self.kernel} uses={self.uses}"
        return f"{self.case.layer} uses={self.uses}"

    @property
    def dtype(self) -> torch.dtype:
        return self.call["feats" if isinstance(self.case, EmCase) else "x"].dtype


def main(arguments: Sequence[str]) -> int:
    """Time all tiles. Returns 1 if one fails, else 0."""
    options = own.StepParser("sweep", __doc__).parse(arguments)
    gpu = Gpu.of_arch(options.arch) if options.rehearse else Gpu.here()
    selection = Selection(own.DEVICE, tiny=options.tiny)
    method = Method(own.DEVICE, rounds=ROUNDS, seconds=SECONDS)
    place = Nowhere() if options.rehearse else Elsewhere(selection, method, own.SILENCE)
    cases = functools.partial(swept_cases, gpu)
    rows: dict[Key, Row] = {}

    def found(row: Row) -> None:
        # The host's time is left out: it is mostly the replacement of the tile.
        rows[Key.of(row)] = replace(row, host_us=None)
        write_csv(options.out / own.SWEEP, rows.values())

    with contextlib.closing(place):
        machine = place.machine(["bf16"])
        for case in cases(selection):
            print(case.name, flush=True)
            place.measure(cases, case, machine, found)
    return 1 if any(row.gate.startswith("failed") for row in rows.values()) else 0


def swept_launches(gpu: Gpu, tiny: bool) -> list[Launch]:
    """All launches of the sweep, for the warm-up."""
    return [
        Launch(swept.call, tile)
        for swept in dominant(tiny)
        for tile in tiles_of(swept, gpu, tiny).values()
    ]


def swept_cases(gpu: Gpu, selection: Selection) -> Iterator[Case]:
    """A case for each kernel of ``dominant``."""
    for swept in dominant(selection.tiny):
        yield make_case(swept, tiles_of(swept, gpu, selection.tiny), gpu, selection.device)


def make_case(swept: Swept, tiles: dict[str, Tile], gpu: Gpu, device: str) -> Case:
    """A kernel as a case whose providers are tiles.

    Args:
        swept: the kernel.
        tiles: by name, the shipped one first.
        gpu: what the tiles are compiled for.
        device: where they run.
    """
    problem = functools.cache(functools.partial(_make_problem, swept, device))
    shipped, *_ = tiles
    return Case(
        suite=own.SWEEP_SUITE,
        name=swept.name,
        providers={
            name: functools.partial(provide, Launch(swept.call, tile), gpu, problem)
            for name, tile in tiles.items()
        },
        baseline=shipped,
        error=lambda got: _difference(got, problem()[1]),
        bound=torch.finfo(swept.dtype).eps,
        prepare=problem,
        floor=swept.case.floor(),
        dtype=DTYPE_NAMES[swept.dtype],
        graph=True,
    )


@functools.cache
def dominant(tiny: bool) -> list[Swept]:
    """The convolutions with the most FLOPs in the four networks, then the pairs with the most.

    Then one of ``conv_taps``: it has few FLOPs, and its gathers take the time. Last four kernels of
    the EM attention block of a whole image.
    """
    if tiny:
        convolution, *others = small_calls()
        pair = next(call for call in others if call.name == "expand_reduce")
        block = EmCase("block", 1, logits_size(*SMALL), 64, 16)
        swept = [Swept(case_of(call), 1) for call in (convolution, pair)]
        return [*swept, Swept(block, 1, "em_e_step")]
    uses: Counter[OperatorCall] = Counter()
    for network, mode in itertools.product(NETWORKS, MODES):
        for call, count in walk(network, mode, SIZE).items():
            for launched in _launched(call):
                uses[launched.but(backend="triton")] += count
    flops = {call: count * case_of(call).floor().flops for call, count in uses.items()}
    costliest = sorted(flops, key=flops.__getitem__, reverse=True)
    convolutions = [call for call in costliest if call.name == "conv_bias_act"]
    pairs = [call for call in costliest if call.name == "expand_reduce"]
    taps = next(call for call in convolutions if call["x"].shape[1] == 3)
    wanted = *convolutions[:CONVOLUTIONS], *pairs[:PAIRS], taps
    block = EmCase("block", 1, logits_size(*SIZE))
    return [
        *(Swept(case_of(call), uses[call]) for call in wanted),
        *(Swept(block, len(NETWORKS), kernel) for kernel in EM_CANDIDATES),
    ]


def _launched(call: OperatorCall) -> list[OperatorCall]:
    """The convolutions and pairs that a call of a network launches on a GPU."""
    is_pair = call.name == "expand_reduce" and meta.has_kernel(call)
    return [call] if is_pair else convolutions_of(call)


def tiles_of(swept: Swept, gpu: Gpu, tiny: bool) -> dict[str, Tile]:
    """The shipped tile of a kernel, and others that suit it, by name."""
    shipped = meta.shipped_tile(swept.call, gpu, swept.kernel)
    special = {"conv_taps": TAPS_CANDIDATES, "conv_expand_reduce": PAIR_CANDIDATES}
    candidates = (special | EM_CANDIDATES).get(shipped.kernel, CANDIDATES)
    others = [_with_sizes(shipped, sizes) for sizes in candidates]
    others = [tile for tile in others if tile != shipped and _suits(tile, swept)]
    found = {tile_name(shipped) + own.SHIPPED: shipped}
    return found | {tile_name(tile): tile for tile in others[: 1 if tiny else None]}


def tile_name(tile: Tile) -> str:
    """Such as "128x256x64 w8 s4": sizes in the order of ``SIZE_NAMES``, warps and stages."""
    sizes = "x".join(str(tile.meta[name]) for name in _size_names(tile))
    return f"{sizes} w{tile.num_warps} s{tile.pipeline_stages}"


def _size_names(tile: Tile) -> list[str]:
    return [name for name in SIZE_NAMES if name in tile.meta]


def _with_sizes(tile: Tile, sizes: tuple[int, ...]) -> Tile:
    *blocks, num_warps, pipeline_stages = sizes
    meta = {**tile.meta, **dict(zip(_size_names(tile), blocks, strict=True))}
    return replace(tile, meta=meta, num_warps=num_warps, pipeline_stages=pipeline_stages)


def _suits(tile: Tile, swept: Swept) -> bool:
    """Whether the blocks divide the channels, and at most half of a block is padding.

    The channels of every pair with a kernel are multiples of the blocks, and so are the 512 of the
    EM attention block.
    """
    if not isinstance(swept.case, ConvCase):
        return True
    shape = swept.case.layer.shape
    divides = shape.channels % tile.meta.get("BLOCK_C", 1) == 0
    return divides and tile.meta["BLOCK_O"] < 2 * shape.outputs


def provide(launch: Launch, gpu: Gpu, problem: Callable[[], Problem]) -> Call:
    """The launches of a call, with a tile for one kernel.

    Raises:
        Absent: the tile does not fit the GPU.
    """
    inputs, _ = problem()
    launcher = _launcher(launch.call)

    def run() -> object:
        with torch.inference_mode(), meta.with_tile(launch.tile):
            return launcher(*inputs)

    try:
        run()
    except (TileReplaced, triton.OutOfResources) as error:
        raise Absent(f"it does not fit: {error.__cause__ or error}") from None
    print(resources(launch, gpu), flush=True)
    return run


def _launcher(call: OperatorCall) -> Callable[..., object]:
    """What launches the kernel, without tapes, and without another start with a smaller tile."""
    if call.name == "em_attention_block":
        return inspect.unwrap(em_block.run_block)
    if call.name == "expand_reduce":
        return inspect.unwrap(conv_expand_reduce.expand_reduce)
    names = "stride", "dilation", "relu", "out_dtype", "precision"
    geometry = {name: call[name] for name in names}
    return functools.partial(inspect.unwrap(conv_triton.conv_bias_act), **geometry)


def _make_problem(swept: Swept, device: str) -> Problem:
    """The inputs, and the results of the shipped tile."""
    inputs = swept.case.inputs(device)
    if isinstance(swept.case, EmCase):
        return inputs, em_block.run_block(*inputs)
    return inputs, swept.case.runner(device)()  # the same values at every call


def _difference(got: object, want: tuple[Tensor, ...]) -> float:
    """The largest difference of an output, over its largest value."""
    outputs = got if isinstance(got, tuple) else (got,)
    return worst(
        ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()
        for found, wanted in zip(outputs, want, strict=True)
    )


def resources(launch: Launch, gpu: Gpu) -> str:
    """What the compiled kernel needs; registers and stack only where there is cuobjdump."""
    _, kernels = meta.compile_kernels(launch, gpu)
    assert launch.tile
    name = f"{launch.tile.kernel} {tile_name(launch.tile)}"
    # An EM kernel may be compiled for several uses.
    own_kernels = [kernel for kernel in kernels if kernel.name == launch.tile.kernel]
    return "\n".join(f"{name}: {_resources(kernel)}" for kernel in own_kernels)


def _resources(kernel: CompiledKernel) -> str:
    said = f"{kernel.metadata.shared} bytes of shared memory"
    try:
        registers, stack = compiled_code.resources(compiled_code.dumped(kernel.asm["cubin"]))
    except (KeyError, OSError, subprocess.CalledProcessError):
        return said
    return f"{said}, {registers} registers and {stack} bytes of stack a thread"


if __name__ == "__main__":
    own.run_main(main)
