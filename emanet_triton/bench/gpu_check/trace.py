"""A step: the kernels of a whole network, in one replay of its CUDA graph and in one eager call."""

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.families import SIZE
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.suites import model
from emanet_triton.bench.suites.model_problem import Problem, make_image
from emanet_triton.errors import describe
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.kernels.replay import Replay

NETWORKS = (("r50", "whole"), ("r50", "slide"), ("r101", "whole"))
TINY_SIZE = (40, 64)
COLUMNS = ("kernel", "count", "us", "grid", "block", "registers", "shared")


def main(arguments: Sequence[str]) -> int:
    """Trace every network. Returns 1 if one fails, else 0."""
    options = own.StepParser("trace", __doc__).parse(arguments)
    failed = 0
    for network, mode in NETWORKS:
        name = f"{network}_{mode}"
        if options.rehearse:
            _write_kernels(options.out / f"{name}_replay.csv", [])
            print(f"{name}: {own.REHEARSAL}")
            continue
        try:
            with cuda_fp32("ieee"):
                _trace(network, mode, options.tiny, options.out)
        except Exception as error:  # such as a profiler that cannot watch this GPU
            print(f"{name}: failed: {describe(error)}", flush=True)
            failed = 1
    return failed


def _trace(network: str, mode: str, tiny: bool, folder: Path) -> None:
    size = TINY_SIZE if tiny else SIZE
    protocol = make_protocol(mode, size, tiny)
    image = make_image(size)
    problem = Problem(network, protocol, image, own.DEVICE, resident=True, tiny=tiny)
    eager = model.fused(problem, "bf16")
    eager()  # compiles, and chooses convolutions
    for way, call in (("replay", Replay(eager)), ("eager", eager)):
        call()
        name = f"{network}_{mode}_{way}"
        trace = folder / f"{name}.json.gz"
        _profile(call, trace)
        with gzip.open(trace) as file:
            kernels = kernels_of(json.load(file))
        _write_kernels(folder / f"{name}.csv", kernels)
        total = sum(row["us"] for row in kernels)
        print(f"{name}: {len(kernels)} kernels, {total:.0f} us", flush=True)


def _profile(call: Callable[[], object], path: Path) -> None:
    """Write one call as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))  # which compresses it, by the end of its name


def kernels_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels of a Chrome trace that PyTorch's profiler wrote, the longest first.

    Returns:
        For each kernel and way to launch it: how often it ran, microseconds of all runs, grid,
        block, registers of a thread, bytes of shared memory of a program.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            given = event.get("args", {})
            grid, block = ("x".join(map(str, given.get(key, []))) for key in ("grid", "block"))
            resources = given.get("registers per thread"), given.get("shared memory")
            found.setdefault((event["name"], grid, block, *resources), []).append(event["dur"])
    rows = [(name, len(us), round(sum(us), 3), *rest) for (name, *rest), us in found.items()]
    rows.sort(key=lambda row: -row[2])
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _write_kernels(path: Path, kernels: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kernels or [{"kernel": own.REHEARSAL}])


if __name__ == "__main__":
    own.run_main(main)
