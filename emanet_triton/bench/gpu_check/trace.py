"""A step: what the GPU does in one replay and in one eager call of a whole network."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.families import SIZE
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.suites import model
from emanet_triton.errors import describe
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.kernels.replay import Replay

NETWORKS = (("r50", "whole"), ("r50", "slide"), ("r101", "whole"))
TINY_SIZE = (40, 64)
COLUMNS = ("kernel", "count", "us", "grid", "block", "registers", "shared")


def main(arguments: Sequence[str]) -> int:
    """Trace every network: 1 where one fails, else 0."""
    options = own.parser("trace", __doc__).parse_args(arguments)
    failed = 0
    for network, mode in NETWORKS:
        name = f"{network}_{mode}"
        if options.rehearse:
            _write_kernels(options.out / f"{name}_replay.csv", [])
            print(f"{name}: {own.REHEARSAL}")
            continue
        try:
            with cuda_fp32("ieee"):
                _trace(network, mode, options.tiny, options.out / name)
        except Exception as error:  # such as a profiler that cannot watch this GPU
            print(f"{name}: failed: {describe(error)}", flush=True)
            failed = 1
    return failed


def _trace(network: str, mode: str, tiny: bool, path: Path) -> None:
    size = TINY_SIZE if tiny else SIZE
    protocol = make_protocol(mode, size, tiny)
    image = model.make_image(size)
    problem = model.Problem(network, protocol, image, own.DEVICE, resident=True, tiny=tiny)
    eager = model.fused(problem, "bf16")
    eager()  # compiles, and chooses convolutions
    for way, call in (("replay", Replay(eager)), ("eager", eager)):
        call()
        target = path.with_name(f"{path.name}_{way}")
        _profile(call, target.with_suffix(".json"))
        kernels = kernels_of(json.loads(target.with_suffix(".json").read_text()))
        _write_kernels(target.with_suffix(".csv"), kernels)
        total = sum(row["us"] for row in kernels)
        print(f"{target.name}: {len(kernels)} kernels, {total:.0f} us", flush=True)


def _profile(call: Callable[[], object], path: Path) -> None:
    """One call as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))


def kernels_of(trace: dict) -> list[dict[str, object]]:
    """The kernels of a Chrome trace that PyTorch's profiler wrote, the longest first.

    Returns:
        For each kernel and way to launch it: how often, microseconds of all, grid, block,
        registers of a thread, bytes of shared memory of a program.
    """
    counts: Counter[tuple] = Counter()
    times: Counter[tuple] = Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") != "kernel":
            continue
        given = event.get("args", {})
        grid, block = ("x".join(map(str, given.get(key, []))) for key in ("grid", "block"))
        resources = given.get("registers per thread"), given.get("shared memory")
        key = event["name"], grid, block, *resources
        counts[key] += 1
        times[key] += event["dur"]
    ordered = sorted(times, key=times.get, reverse=True)
    return [
        dict(zip(COLUMNS, (key[0], counts[key], round(times[key], 3), *key[1:]), strict=True))
        for key in ordered
    ]


def _write_kernels(path: Path, kernels: list[dict[str, object]]) -> None:
    own.write_table(path, kernels or [dict.fromkeys(COLUMNS, "") | {"kernel": own.REHEARSAL}])


if __name__ == "__main__":
    own.run_main(main)
