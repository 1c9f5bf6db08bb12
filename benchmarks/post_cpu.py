"""Time the post-processing on the CPU, and its memory: the plain sequence and the tap tables.

    python benchmarks/post_cpu.py --out benchmarks/results/post_cpu.csv

Takes random logits of stride 8 to uint8 labels of 1024x2048. The plain sequence resizes, softmaxes
and takes the argmax at full size, in mmseg's order. No time is reported for wrong labels.
"""

import argparse
import csv
import datetime
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from tabulate import tabulate
from torch import Tensor

from emanet_triton.eval.reference import view_logits
from emanet_triton.eval.taps import tap_tables
from emanet_triton.eval.views import Size, view_sizes, window_grid
from emanet_triton.kernels.resample import resample_labels
from emanet_triton.models.protocol import Protocol

SIZE = 2048, 1024  # (width, height) of the image
CLASSES = 19
WHOLE = Protocol((2048, 1024))
SLIDE = Protocol((2049, 1025), "slide", (769, 769), (513, 513), align_corners=True)
CASES = {
    "whole": (WHOLE, False),
    "slide": (SLIDE, False),
    "whole ms+flip": (WHOLE, True),
    "slide ms+flip": (SLIDE, True),
}
RESULTS = Path(__file__).parent / "results" / "post_cpu.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to write")
    options = parser.parse_args()

    rows, where = [], environment()
    for case in options.cases:
        for threads in options.threads:
            rows += [row | where for row in measure(case, threads, options.rounds)]
            write(options.out, rows)
    columns = ["case", "threads", "provider", "p50_ms", "ratio", "peak_mb", "memory_ratio"]
    print(tabulate([[row[c] for c in columns] for row in rows], columns))


class Problem:
    """The logits that a network would have given for one image, and both ways to its labels."""

    def __init__(self, protocol: Protocol, ms_flip: bool, size: Size) -> None:
        self.protocol, self.ms_flip, self.size = protocol, ms_flip, size
        generator = torch.Generator().manual_seed(0)
        self.views = []  # (size of the network's input, mirrored, logits [windows, C, h, w])
        for scale in view_sizes(protocol, size, ms_flip):
            rows, columns = window_grid(protocol, scale)
            low = (-(-(spans[0][1] - spans[0][0]) // 8) for spans in (rows, columns))
            shape = len(rows) * len(columns), CLASSES, *low
            for mirrored in (False, True) if ms_flip else (False,):
                self.views.append((scale, mirrored, 4 * torch.randn(shape, generator=generator)))

    def plain(self) -> Tensor:
        return self.plain_probabilities().argmax(1).to(torch.uint8)

    def plain_probabilities(self, dtype: torch.dtype = torch.float32) -> Tensor:
        total = None
        for scale, mirrored, logits in self.views:
            view = self._plain_logits(scale, logits.to(dtype)).softmax(1)
            view = view.flip(3) if mirrored else view
            total = view if total is None else total.add_(view)
        return total / len(self.views)

    def taps(self) -> Tensor:
        return resample_labels(*self._packed())

    def _plain_logits(self, scale: Size, logits: Tensor) -> Tensor:
        inputs = torch.empty(1, 1, 1, 1).expand(1, 3, *scale[::-1])  # only its size is looked at
        return view_logits(lambda _: logits, inputs, self.size, self.protocol)

    def _packed(self) -> tuple:
        low = tuple(tuple(logits.shape[2:]) for _, mirrored, logits in self.views if not mirrored)
        tables = tap_tables(self.protocol, self.size, low, self.ms_flip, torch.device("cpu"))
        views = [logits.transpose(0, 1).flatten(1)[None] for _, _, logits in self.views]
        return torch.cat(views, 2) if len(views) > 1 else views[0], *tables


PROVIDERS = {"plain": Problem.plain, "taps": Problem.taps}


@torch.inference_mode()
def measure(case: str, threads: int, rounds: int) -> Iterator[dict[str, object]]:
    """A row for each provider, timed in turns, after a check of the labels."""
    torch.set_num_threads(threads)
    problem = Problem(*CASES[case], SIZE)
    check(case, problem)
    times = {name: [] for name in PROVIDERS}
    for i in range(rounds):
        for name in PROVIDERS if i % 2 == 0 else reversed(PROVIDERS):
            start = time.perf_counter()
            PROVIDERS[name](problem)
            times[name].append(time.perf_counter() - start)
    peaks = {name: in_new_process(case, name, threads) for name in PROVIDERS}
    for name, seconds in times.items():
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        ratios = (plain / own for plain, own in zip(times["plain"], seconds, strict=True))
        yield {
            "case": case,
            "threads": threads,
            "provider": name,
            **{f"p{10 * i + 10}_ms": f"{1e3 * deciles[i]:.4g}" for i in (1, 4, 7)},
            "ratio": f"{statistics.median(ratios):.2f}",
            "peak_mb": f"{peaks[name] / 1e6:.1f}",
            "memory_ratio": f"{peaks['plain'] / peaks[name]:.1f}",
        }


def check(case: str, problem: Problem) -> None:
    """Refuse labels that differ from float64's where its two best classes are 1e-5 apart.

    In float32 the plain sequence itself is further off: it rounds the positions it reads from.
    """
    exact = problem.plain_probabilities(torch.float64)
    best = exact.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5
    wrong = int((exact.argmax(1) != problem.taps())[clear].sum())
    if wrong or clear.double().mean() < 0.999:
        raise SystemExit(
            f"error: {case}: {wrong} labels are wrong of {int(clear.sum())} clear ones"
        )


def in_new_process(case: str, name: str, threads: int) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_bytes, (case, name, threads))


@torch.inference_mode()
def peak_bytes(case: str, name: str, threads: int) -> int:
    """How far this process's resident memory rises above what its inputs and libraries take."""
    torch.set_num_threads(threads)
    problem = Problem(*CASES[case], SIZE)
    PROVIDERS[name](Problem(Protocol((64, 32)), True, (64, 32)))  # loads what the libraries load
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    PROVIDERS[name](problem)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def environment() -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "device": f"{names[0]}, {len(names)} cores",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
