"""Time the EM attention block on the CPU: mmseg's operations and the folded path, in turns.

    python benchmarks/em_cpu.py --out benchmarks/results/em_cpu.csv

No time is reported for a provider that fails its correctness check.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import em_common
import torch
from tabulate import tabulate

from emanet_triton.kernels import ops

LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
RESULTS = Path(__file__).parent / "results" / "em_cpu.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to write")
    options = parser.parse_args()

    where = em_common.environment(cpu_name())
    rows = []
    for positions in options.positions:
        for layout in LAYOUTS:
            for measured in measure(positions, layout, options.threads, options.rounds):
                rows.append(measured | where)
                em_common.write_rows(options.out, rows)
    columns = ["provider", "N", "layout", "threads", "p50_ms", "ratio", "error"]
    print(tabulate([[row[c] for c in columns] for row in rows], columns))


@torch.no_grad()
def measure(positions: int, layout: str, threads: list[int], rounds: int) -> list[dict]:
    """The rows of one size and layout, for every number of threads."""
    problem = em_common.make_problem(1, em_common.SIZES[positions], memory_format=LAYOUTS[layout])
    arguments = problem.block_arguments()
    providers = {
        "mmseg": lambda: em_common.mmseg_block(problem),
        "folded": lambda: ops.em_attention_block(*arguments, backend="torch"),
    }
    want = em_common.float64_block(problem)
    errors = {name: em_common.relative_error(call(), want) for name, call in providers.items()}
    if not em_common.passes(errors["folded"], errors["mmseg"]):
        raise SystemExit(f"error: the folded path is wrong at N={positions}, {layout}: {errors}")

    _, channels, bases = problem.bases.shape
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        times = em_common.alternate(providers, wall_clock, rounds)
        for name, seconds in times.items():
            shape = {"B": 1, "C": channels, "K": bases, "N": positions, "dtype": "fp32"}
            setting = {"layout": layout, "threads": count}
            timed = em_common.summary(seconds, times["mmseg"])
            error = {"error": f"{errors[name]:.1e}"}
            rows.append({"provider": name} | shape | setting | timed | error)
    return rows


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_name() -> str:
    """The processor's name and number of cores, as Linux tells them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores"


if __name__ == "__main__":
    main()
