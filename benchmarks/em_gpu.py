"""Time the EM operators on a GPU against mmseg's operations, eager and compiled, in turns.

    python benchmarks/em_gpu.py --out DIR [--positions N ...] [--batches B ...] [--dtypes D ...]

Writes DIR/em_gpu.csv as it goes and prints a short table last. A provider that fails its
correctness check gets no time, and the command then exits with 1. ``predicted_us`` is what the
design notes forecast before anything was measured; nothing is computed from it.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import em_common
import torch
from tabulate import tabulate
from torch import Tensor

from emanet_triton.kernels import cost, ops, reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPERATIONS = ("em_attention", "em_attention_block")
PROVIDERS = ("mmseg", "mmseg-compiled", "mmseg-graph", "triton", "triton-graph")
PREDICTED_US = {  # operation, dtype, B, N
    ("em_attention_block", "bf16", 1, 32768): "140-175",
    ("em_attention_block", "bf16", 8, 32768): "770-1040",
}
ROTATED_BYTES = 256 * 2**20  # of inputs in rotation: several times any cache

Call = Callable[[], Sequence[Tensor]]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for em_gpu.csv")
    sizes = list(em_common.SIZES)
    parser.add_argument("--positions", type=int, nargs="+", default=sizes, choices=sizes)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS)
    parser.add_argument("--providers", nargs="+", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--precision", default="ieee", choices=("ieee", "tf32x3", "tf32"))
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    if "mmseg" not in options.providers:
        parser.error("--providers needs mmseg, which the others are compared with")
    return options


@torch.no_grad()
def main() -> int:
    options = parse_arguments()
    if not torch.cuda.is_available():
        print("error: em_gpu.py measures a GPU, and PyTorch finds none here", file=sys.stderr)
        return 2
    where = em_common.environment(torch.cuda.get_device_name())
    bandwidth = copy_bandwidth()
    rates = {name: matmul_rate(dtype) for name, dtype in DTYPES.items()}
    print(f"{where['device']}: copy {bandwidth / 1e12:.2f} TB/s, matmul in TFLOP/s:", end=" ")
    print(*(f"{name} {rate / 1e12:.0f}" for name, rate in rates.items()), sep=", ")

    rows = []
    for dtype, positions, batch, operation in itertools.product(
        options.dtypes, options.positions, options.batches, options.operations
    ):
        torch.compiler.reset()
        shape = cost.Shape(batch, positions, dtype=dtype, precision=options.precision)
        ceilings = bandwidth, rates[dtype]
        for row in measure(operation, shape, options.providers, options.rounds, ceilings):
            rows.append(row | where)
            print(*(row[c] for c in ("operation", "dtype", "B", "N", "provider", "p50_ms")))
            em_common.write_rows(options.out / "em_gpu.csv", rows)
    columns = ["operation", "dtype", "B", "N", "provider", "gate", "p50_ms", "ratio", "x_floor"]
    print(tabulate([[row[c] for c in columns] for row in rows], columns))
    return 0 if all(row["gate"] == "passed" for row in rows) else 1


def measure(
    operation: str,
    shape: cost.Shape,
    providers: Sequence[str],
    rounds: int,
    ceilings: tuple[float, float],
    device: str = "cuda",
    clock: Callable[[Call], float] | None = None,
) -> list[dict[str, object]]:
    """One row for every provider: the correctness gate first, then all that passed in turns."""
    make = functools.partial(
        em_common.make_problem,
        *(shape.batch, em_common.SIZES.get(shape.positions, (1, shape.positions))),
        *(shape.channels, shape.bases),
        dtype=DTYPES[shape.dtype],
        device=device,
        memory_format=torch.channels_last,
    )
    problems = [make(seed=seed) for seed in range(rotation(shape))]
    calls, gates, errors = {}, {}, {}
    for name in dict.fromkeys(("mmseg", *providers)):
        try:
            each = [provide(name, operation, problem, shape.precision) for problem in problems]
            errors[name] = worst_error(each[0], operation, problems[0])
            passed = em_common.passes(errors[name], errors["mmseg"])
            gates[name] = "passed" if passed else "failed: wrong values"
            calls[name] = rotate(each)
        except Exception as error:  # a peer that does not run is a row too, and not the end
            errors[name], gates[name] = float("nan"), f"failed: {type(error).__name__}"
    passed = {name: call for name, call in calls.items() if gates[name] == "passed"}
    times = em_common.alternate(passed, clock or event_clock, rounds)

    rows = []
    for name in providers:
        row = {"operation": operation, "provider": name, "B": shape.batch, "C": shape.channels}
        row |= {"K": shape.bases, "N": shape.positions, "dtype": shape.dtype}
        row |= {"precision": shape.precision, "layout": "channels-last", "gate": gates[name]}
        row |= {"error": f"{errors[name]:.1e}"}
        baseline = times.get("mmseg")
        rows.append(row | figures(operation, name, shape, times.get(name), baseline, ceilings))
    return rows


def figures(
    operation: str,
    provider: str,
    shape: cost.Shape,
    times: Sequence[float] | None,
    baseline: Sequence[float] | None,
    ceilings: tuple[float, float],
) -> dict[str, object]:
    """The measured columns, empty where nothing was timed, and the forecast beside them."""
    floor = {"em_attention": cost.attention_floor, "em_attention_block": cost.block_floor}
    least = floor[operation](shape)
    floor_seconds = least.floor_seconds(*ceilings)
    empty = ("p20_ms", "p50_ms", "p80_ms", "ratio", "x_floor", "gigabytes_s", "teraflops_s")
    columns = dict.fromkeys(empty, "")
    if times:
        columns |= em_common.summary(times, baseline or times)
        seconds = float(columns["p50_ms"]) / 1e3
        columns["ratio"] = columns["ratio"] if baseline else ""
        columns["x_floor"] = f"{seconds / floor_seconds:.2f}"
        columns["gigabytes_s"] = f"{least.bytes / seconds / 1e9:.0f}"
        columns["teraflops_s"] = f"{least.flops / seconds / 1e12:.1f}"
    columns["floor_us"] = f"{1e6 * floor_seconds:.1f}"
    columns["copy_gigabytes_s"], columns["matmul_teraflops_s"] = (
        f"{ceiling / unit:.0f}" for ceiling, unit in zip(ceilings, (1e9, 1e12), strict=True)
    )
    key = operation, shape.dtype, shape.batch, shape.positions
    forecast = PREDICTED_US.get(key, "") if provider.startswith("triton") else ""
    return columns | {"predicted_us": forecast}


def provide(name: str, operation: str, problem: em_common.Problem, precision: str) -> Call:
    """A call of no arguments that runs one provider on one problem."""
    peer, _, how = name.partition("-")
    if peer == "triton":
        options = {"backend": "triton", "precision": precision}
        if operation == "em_attention":
            call = functools.partial(ops.em_attention, problem.feats, problem.bases, **options)
        else:
            arguments = problem.block_arguments()
            call = functools.partial(ops.em_attention_block, *arguments, **options)
    else:
        attention = operation == "em_attention"
        function = em_common.mmseg_attention if attention else em_common.mmseg_block
        function = torch.compile(function, dynamic=False) if how == "compiled" else function
        arguments = (problem.feats, problem.bases) if attention else (problem,)
        call = functools.partial(function, *arguments)
    return captured(call) if how == "graph" else call


def captured(call: Call) -> Call:
    """The call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        return outputs

    return replay


def rotation(shape: cost.Shape) -> int:
    """How many inputs to rotate, so that no call finds its own in a cache."""
    return min(8, max(2, -(-ROTATED_BYTES // shape.feats)))


def rotate(calls: Sequence[Call]) -> Call:
    """A call that runs the next of ``calls`` each time."""
    following = itertools.cycle(calls)
    return lambda: next(following)()


def worst_error(call: Call, operation: str, problem: em_common.Problem) -> float:
    """The largest error against float64 of the first and of the last image."""
    got = call()
    errors = []
    for image in {0, len(problem.feats) - 1}:
        if operation == "em_attention":
            x = problem.feats[image : image + 1].flatten(2).double()
            want = reference.em_attention(x, problem.bases.double())
        else:
            want = em_common.float64_block(problem, image)
        errors.append(em_common.relative_error(got, want, image))
    return max(errors, key=lambda error: (error != error, error))


def event_clock(call: Call) -> float:
    """Seconds between two CUDA events around one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes/s of a copy on the device, those read and those written."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / best_time(lambda: target.copy_(source))


def matmul_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of a square product."""
    a, b = (torch.randn(size, size, dtype=dtype, device="cuda") for _ in range(2))
    return 2 * size**3 / best_time(lambda: a @ b)


def best_time(call: Callable[[], object], rounds: int = 20) -> float:
    """The median of a few timings after a warm-up."""
    times = em_common.alternate({"": call}, event_clock, rounds)[""]
    return sorted(times)[rounds // 2]


if __name__ == "__main__":
    sys.exit(main())
