"""Time the network on the CPU: plain and fused, float32 and bfloat16, in turns.

    python benchmarks/net_cpu.py --out benchmarks/results/net_cpu.csv

Times are the process's CPU time on one thread, wall-clock time on more. No time is reported for
a provider that fails its correctness check. Peak memory is that of a process of its own.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import em_common
import em_cpu
import torch
from tabulate import tabulate
from torch import Tensor, nn

from emanet_triton import fuse
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
PROVIDERS = ("plain fp32", "plain bf16", "fused fp32", "fused bf16")
FP32_ERROR = 1e-4  # relative, of the logits
RESULTS = Path(__file__).parent / "results" / "net_cpu.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=BLOCKS, default=["r50"])
    parser.add_argument("--heights", type=int, nargs="+", default=[512, 1024], help="of W = 2 H")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV file to write")
    options = parser.parse_args()

    where = em_common.environment(em_cpu.cpu_name())
    rows = []
    for network in options.networks:
        for height in options.heights:
            for measured in measure(network, height, options.threads, options.rounds):
                rows.append(measured | where)
                em_common.write_rows(options.out, rows)
    columns = ["provider", "network", "size", "threads", "p50_ms", "ratio", "error", "peak_mb"]
    print(tabulate([[row[c] for c in columns] for row in rows], columns))


@torch.no_grad()
def measure(network: str, height: int, threads: list[int], rounds: int) -> list[dict]:
    """The rows of one network and size, for every number of threads."""
    images = make_images(height)
    calls = {name: make_call(name, make_model(network), images) for name in PROVIDERS}
    want = calls["plain fp32"]()
    errors = {name: relative_error(call(), want) for name, call in calls.items()}
    if errors["fused fp32"] > FP32_ERROR or errors["fused bf16"] > 2 * errors["plain bf16"]:
        raise SystemExit(f"error: the fused network is wrong, {network} at {height}: {errors}")
    peaks = {name: peak_megabytes(name, network, height) for name in PROVIDERS}

    rows = []
    for count in threads:
        torch.set_num_threads(count)
        clock = cpu_time if count == 1 else em_cpu.wall_clock
        times = em_common.alternate(calls, clock, rounds)
        for name, seconds in times.items():
            setting = {"network": network, "size": f"{height}x{2 * height}", "threads": count}
            timed = em_common.summary(seconds, times["plain fp32"])
            checked = {"error": f"{errors[name]:.1e}", "peak_mb": peaks[name]}
            rows.append({"provider": name} | setting | timed | checked)
    return rows


def make_images(height: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, height, 2 * height, generator=generator)


def make_model(network: str) -> EMANet:
    """Weights after He, which keep the size of the activations."""
    torch.manual_seed(0)
    model = EMANet(Architecture(BLOCKS[network]), Protocol((2048, 1024))).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model


def make_call(provider: str, model: EMANet, images: Tensor) -> Callable[[], Tensor]:
    """The network of this name at work."""
    kind, precision = provider.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    network = fuse(model, dtype=dtype) if kind == "fused" else model.to(dtype)
    images = images.to(dtype)
    return lambda: network(images)


def peak_megabytes(provider: str, network: str, height: int) -> int:
    """What one image takes at most, weights and PyTorch included."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run_once, (provider, network, height))


@torch.no_grad()
def _run_once(provider: str, network: str, height: int) -> int:
    make_call(provider, make_model(network), make_images(height))()
    # Not getrusage's ru_maxrss, which starts from the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def cpu_time(call: Callable[[], object]) -> float:
    """Seconds of CPU time that one call takes, which other processes disturb little."""
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
