"""A step: the convolutions that cost the networks most, with other tiles than the shipped ones."""

import functools
import itertools
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import triton
from torch import Tensor

from emanet_triton.bench.ahead_of_time import code as compiled_code
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.gpu_check import meta, own
from emanet_triton.bench.gpu_check.conv_cases import ConvCase
from emanet_triton.bench.gpu_check.families import MODES, SIZE, separate, small_calls
from emanet_triton.bench.gpu_check.lanes import run_lanes
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.machine import Machine, measure_machine
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.bench.networks import NETWORKS
from emanet_triton.bench.rows import PASSED
from emanet_triton.bench.suites.conv_layers import Layer, layers
from emanet_triton.bench.walk import OperatorCall, walk
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.launch import TileReplaced
from emanet_triton.kernels.replay import Replay, seconds_on_device
from emanet_triton.kernels.tile import Tile

SHAPES = 12
ROUNDS = 5
SILENCE = 45  # seconds

# BLOCK_M, BLOCK_O, BLOCK_C, warps, stages.
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


@dataclass
class Swept:
    """A convolution with one tile.

    Attributes:
        shape, uses: which, and how often R50 and R101, whole and sliding, run it.
        kernel, tile: what was launched, "M x O x C, warps, stages".
        shipped: whether the table has this tile for it.
        gate: "passed", "absent: why" or "failed: why".
        ms, cold_ms: of a replay with a warm and with a cold L2 cache.
        tflop_s, floor_share: what the warm time comes to; the floor over it.
        registers, stack, shared: of a thread, of a thread in bytes, of a program in bytes.
    """

    shape: str
    uses: int
    kernel: str
    tile: str
    shipped: bool
    gate: str = f"absent: {own.REHEARSAL}"
    ms: float | None = None
    cold_ms: float | None = None
    tflop_s: float | None = None
    floor_share: float | None = None
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One launch of a sweep."""

    launch: Launch
    uses: int
    shipped: bool

    def row(self) -> Swept:
        tile = self.launch.tile
        blocks = "x".join(str(tile.meta[f"BLOCK_{letter}"]) for letter in "MOC")
        text = f"{blocks} warps={tile.num_warps} stages={tile.num_stages}"
        name = ConvCase(self.launch.call).name
        return Swept(name, self.uses, tile.kernel, text, self.shipped)


def main(arguments: Sequence[str]) -> int:
    """Time all tiles: 1 where one fails, else 0."""
    options = own.parser("sweep", __doc__).parse_args(arguments)
    gpu = Gpu.of_arch(options.arch) if options.rehearse else Gpu.here()
    rows: list[Swept] = []

    def found(row: Swept) -> None:
        rows.append(row)
        own.write_table(options.out / own.SWEEP, map(asdict, rows))
        print(row.shape, row.tile, row.ms, row.cold_ms, row.gate, flush=True)

    wanted = list(candidates(gpu, options.tiny))
    if options.rehearse:
        for candidate in wanted:
            found(candidate.row())
    else:
        _run(wanted, gpu, found)
    return 1 if any(row.gate.startswith("failed") for row in rows) else 0


def swept_launches(gpu: Gpu, tiny: bool) -> list[Launch]:
    """All launches of the sweep, for the warm-up."""
    return [candidate.launch for candidate in candidates(gpu, tiny)]


def candidates(gpu: Gpu, tiny: bool) -> Iterator[Candidate]:
    """Each shape with its shipped tile, which comes first, and with others that suit it."""
    for call, uses in dominant(tiny):
        shipped = shipped_tile(call, gpu)
        tiles = dict.fromkeys([_sizes(shipped), *CANDIDATES])
        suiting = [sizes for sizes in tiles if _suits(sizes, call)]
        for sizes in suiting[: 2 if tiny else None]:
            tile = _with_sizes(shipped, sizes)
            yield Candidate(Launch(call, tile), uses, sizes == _sizes(shipped))


def dominant(tiny: bool) -> list[tuple[OperatorCall, int]]:
    """The convolutions of the most FLOPs in all four networks, and how often those run them."""
    if tiny:
        calls = (call for call in small_calls() if call.name == "conv_bias_act")
        return [(next(calls), 1)]
    uses: Counter[OperatorCall] = Counter()
    for network, mode in itertools.product(NETWORKS, MODES):
        for call, count in walk(network, mode, SIZE).items():
            for own_call in separate(call) or [call]:
                if own_call.name == "conv_bias_act":
                    uses[own_call.but(provider="triton")] += count
    flops = {call: count * _layer(call).shape.flops for call, count in uses.items()}
    return [(call, uses[call]) for call in sorted(flops, key=flops.get, reverse=True)[:SHAPES]]


def shipped_tile(call: OperatorCall, gpu: Gpu) -> Tile:
    """The tile that the table has for a convolution."""
    found: list[Tile] = []
    table = conv_tiles.tile

    def noted(*arguments: object) -> Tile:
        found.append(table(*arguments))
        return found[-1]

    with mock.patch.object(conv_tiles, "tile", noted):
        meta.kernels_of(Launch(call), gpu)
    return found[0]


def _sizes(tile: Tile) -> tuple[int, ...]:
    blocks = (tile.meta[f"BLOCK_{letter}"] for letter in "MOC")
    return *blocks, tile.num_warps, tile.num_stages


def _with_sizes(tile: Tile, sizes: tuple[int, ...]) -> Tile:
    block_m, block_o, block_c, num_warps, num_stages = sizes
    blocks = {"BLOCK_M": block_m, "BLOCK_O": block_o, "BLOCK_C": block_c}
    return Tile(tile.kernel, tile.arch, tile.dtype, {**tile.meta, **blocks}, num_warps, num_stages)


def _suits(sizes: tuple[int, ...], call: OperatorCall) -> bool:
    """Whether its blocks divide the channels, and no more than half of a block is padding."""
    _, block_o, block_c, *_ = sizes
    outputs, channels, *_ = call["weight"].shape
    return channels % block_c == 0 and block_o < 2 * outputs


def _layer(call: OperatorCall) -> Layer:
    (layer,) = layers(Counter([call]))
    return layer


def _run(wanted: Sequence[Candidate], gpu: Gpu, found: Callable[[Swept], None]) -> None:
    """Time everything in one process after the other, with the machine's ceilings first."""
    machines: list[Machine] = []
    jobs = [functools.partial(measure_ceilings)]
    jobs += [functools.partial(time_tile, candidate, gpu) for candidate in wanted]

    def done(job: functools.partial, result: object) -> None:
        if job.func is measure_ceilings:
            machines.extend([] if isinstance(result, Lost) else [result])
            return
        candidate = job.args[0]
        if isinstance(result, Lost):
            row = candidate.row()
            row.gate = f"failed: {result.reason}"
        else:
            row = result
        if machines and row.ms:
            _hold_against_floor(row, candidate.launch.call, machines[0])
        found(row)

    run_lanes([jobs], 1, SILENCE, done)


def measure_ceilings(watch: Watch) -> Machine:
    """Of the GPU."""
    return measure_machine(own.DEVICE, ["bf16"])


def _hold_against_floor(row: Swept, call: OperatorCall, machine: Machine) -> None:
    shape, rate = _layer(call).shape, machine.matmul_tflop_s["bf16"]
    floor = Cost(shape.bytes, shape.flops).floor_seconds(machine.copy_gb_s * 1e9, rate * 1e12)
    row.tflop_s = shape.flops / (row.ms / 1e3) / 1e12
    row.floor_share = 1e3 * floor / row.ms


def time_tile(candidate: Candidate, gpu: Gpu, watch: Watch) -> Swept:
    """The row of a candidate, timed in this process if its result is the shipped tile's.

    Raises:
        Lost: it has broken this process.
    """
    row = candidate.row()
    watch.begins(row.tile)
    try:
        _fill_in(row, candidate.launch, gpu)
    except (TileReplaced, triton.OutOfResources) as error:
        row.gate = f"absent: it does not fit: {error.__cause__ or error}"
    except Exception as error:  # whatever a tile does wrong
        row.gate = watch.gate_of(row.tile, error)
    return row


def _fill_in(row: Swept, launch: Launch, gpu: Gpu) -> None:
    inputs, want = _problem(launch.call)
    names = "stride", "dilation", "relu", "out_dtype", "precision"
    geometry = [launch.call[name] for name in names]

    def run() -> Tensor:
        with meta.tile_of_convolutions(launch.tile):
            return conv_triton.conv_bias_act.__wrapped__(*inputs, *geometry)

    error = (run().double() - want.double()).abs().max().item()
    allowed = torch.finfo(inputs[0].dtype).eps * want.abs().max().item()
    row.gate = PASSED if error <= allowed else f"failed: {error:.2g} off the shipped tile's result"
    if row.gate == PASSED:
        replay = Replay(run)
        row.ms, row.cold_ms = (
            1e3 * statistics.median(seconds_on_device(replay, rounds=ROUNDS, cold=cold))
            for cold in (False, True)
        )
    row.registers, row.stack, row.shared = _resources(launch, gpu)


@functools.lru_cache(maxsize=1)
def _problem(call: OperatorCall) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The inputs, and the output of the shipped tile."""
    case = ConvCase(call)
    (want,) = case.runner(own.DEVICE)()
    return case.inputs(own.DEVICE), want  # the same values at every call


def _resources(launch: Launch, gpu: Gpu) -> tuple[int | None, ...]:
    """Registers, stack and shared memory of the compiled kernel; None where cuobjdump is not."""
    _, (kernel,) = meta.compile_kernels(launch, gpu)
    shared = kernel.metadata.shared
    if "cubin" not in kernel.asm:
        return None, None, shared
    try:
        dump = compiled_code.dumped(kernel.asm["cubin"])
    except (OSError, subprocess.CalledProcessError):
        return None, None, shared
    return *compiled_code.resources(dump), shared


if __name__ == "__main__":
    own.run_main(main)
