"""What large pages save on a CPU: the fused R50 with and without them, in turns.

    python -m emanet_triton.bench.large_pages --csv benchmarks/results/zen5/large_pages.csv

Each process times one network alone, call after call, as an evaluation does. PyTorch reads the
setting once, so each needs a process of its own.
"""

import os
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from tabulate import tabulate

from emanet_triton.bench.machine import MEGABYTE
from emanet_triton.bench.memory import begin_peak, in_child, resident_bytes
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.script_csv import require_table, write_table
from emanet_triton.command import Parser, answer, count, program, run, say, size
from emanet_triton.errors import InputError
from emanet_triton.heap import LARGE_PAGES
from emanet_triton.kernels.device import DTYPES, cpu_name
from emanet_triton.models.fused import fuse

SIZES = ((128, 256), (512, 1024), (1024, 2048))
WAYS = {"small": "0", "large": "1"}  # the pages, and the value of the variable
GIVEN = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # such as "always [madvise] never"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog=program("bench.large_pages"), description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=SIZES, metavar="HxW",
        help="of images, in pixels; default: 128x256 512x1024 1024x2048",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES),
        help="default: fp32 bf16",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=count, default=3, metavar="N",
        help="for each kind of pages; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--calls", type=count, default=8, metavar="N", help="in each; default: %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the figures to a file")
    args = parser.parse_args(arguments)
    if args.csv:
        require_table(args.csv)
    rows: list[dict] = []
    try:
        for image in args.sizes:
            for dtype in args.dtypes:
                rows += _rows(image, dtype, args.processes, args.calls)
    finally:  # an error or Ctrl-C loses no rows
        if rows:
            _report(rows, args.csv)
    return 0


def _report(rows: list[dict], path: Path | None) -> None:
    say(tabulate(rows, headers="keys", tablefmt="github"))
    if path:
        where = {
            "device": cpu_name(), "threads": torch.get_num_threads(), "large pages": _given(),
        }  # fmt: skip
        write_table(path, rows, **where)


def _given() -> str:
    """To whom Linux gives large pages: "madvise" means to a process that asks for them."""
    return GIVEN.read_text().partition("[")[2].partition("]")[0] if GIVEN.exists() else "never"


def _rows(image: tuple[int, int], dtype: str, processes: int, calls: int) -> list[dict]:
    """A row for each kind of pages: medians over the processes, and the largest peak."""
    measured: dict[str, list[tuple[float, float, float]]] = {pages: [] for pages in WAYS}
    for _ in range(processes):
        for pages, value in WAYS.items():
            try:
                result = in_child(_measure, image, dtype, calls, value)
            except BrokenProcessPool as error:
                raise InputError(
                    f"--sizes {image[0]}x{image[1]}, {dtype}: the measuring process ended without "
                    "a result. Linux ends a process where memory is short: try a smaller size"
                ) from error
            measured[pages].append(result)
    rows = []
    for pages, results in measured.items():
        times, system, peaks = zip(*results, strict=True)
        rows.append(
            {
                "case": f"r50 network {image[0]}x{image[1]}",
                "dtype": dtype,
                "pages": pages,
                "p50_ms": round(statistics.median(times), 1),
                "least_ms": round(min(times), 1),
                "most_ms": round(max(times), 1),
                "system_ms": round(statistics.median(system), 1),
                "peak_mb": round(max(peaks), 1),
                "processes": processes,
                "calls": calls,
            }
        )
    return rows


def _measure(
    image: tuple[int, int], dtype: str, calls: int, value: str
) -> tuple[float, float, float]:
    """The median time of a call, the system's part of its CPU time, both in ms, and the peak in MB.

    The peak is the memory beside the network and its input.
    """
    os.environ[LARGE_PAGES] = value
    network = fuse(make_network("r50", make_protocol("whole", image)), dtype=DTYPES[dtype])
    x = torch.randn(1, 3, *image).to(network.dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        network(x[:, :, :64, :64])  # loads what the libraries load at their first call
    begin_peak()
    before = resident_bytes("VmRSS")
    times = []
    with torch.inference_mode():
        network(x)
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        for _ in range(calls):
            begin = time.perf_counter()
            network(x)
            times.append(1e3 * (time.perf_counter() - begin))
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
    peak = (resident_bytes("VmHWM") - before) / MEGABYTE
    return statistics.median(times), 1e3 * system / calls, peak


if __name__ == "__main__":
    run(main)
