"""The machine of a run: its name and versions, how fast it copies and multiplies, its noise."""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from emanet_triton.bench.clocks import Call, events_timer, wall_timer
from emanet_triton.bench.method import Method, Statistics
from emanet_triton.cores import in_words
from emanet_triton.errors import InputError
from emanet_triton.kernels.cache import driver_version, triton_version
from emanet_triton.kernels.device import DTYPES, cpu_name, has_onednn
from emanet_triton.versions import ABSENT, commit, package_version

MEGABYTE = 1e6
# Packages of other software that runs networks.
RUNTIME_PACKAGES = "openvino", "onnxruntime", "onnxruntime-gpu", "torch-tensorrt", "tensorrt"


@dataclass(frozen=True)
class Machine:
    """Where, with what and when a run was made.

    Attributes:
        device: the name of the GPU, or of the processor with its cores and best instructions.
        threads: PyTorch's number of threads; none on a GPU.
        driver: the version of NVIDIA's driver; empty on a CPU.
        torch, triton: their versions.
        commit: of this package's repository.
        date: the day, such as 2026-01-02.
        copy_gb_s: 10^9 bytes/s of a copy; bytes read and bytes written both count.
        matmul_tflop_s: 10^12 FLOP/s by dtype: of a square matrix product, or on a CPU of a
            convolution if that is faster.
        noise: (p80 - p20) / p50 of the times of one such product.
        runtimes: the installed ones of ``RUNTIME_PACKAGES`` with their versions; empty without any.
    """

    device: str
    threads: int | None
    driver: str
    torch: str
    triton: str
    commit: str
    date: str
    copy_gb_s: float
    matmul_tflop_s: dict[str, float]
    noise: float
    runtimes: str = ""

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in self.matmul_tflop_s.items())
        threads = f", {in_words(self.threads)}" if self.threads else ""
        return (
            f"{self.device}{threads}: copy {self.copy_gb_s:.4g} GB/s, matmul in TFLOP/s {rates}, "
            f"noise {100 * self.noise:.1f}%" + (f"; {self.runtimes}" if self.runtimes else "")
        )


def measure_machine(device: str, dtypes: Iterable[str], tiny: bool = False) -> Machine:
    """Name the machine, and measure its rates and its noise.

    Args:
        device: "cpu" or "cuda".
        dtypes: the dtypes of the matrix products, from "fp32", "bf16", "fp16".
        tiny: with small operands, for tests.
    """
    cuda = device == "cuda"
    copied, size = (2**30, 8192) if cuda else (2**28, 1024)
    copied, size = (2**20, 64) if tiny else (copied, size)
    products = {name: _matmul_seconds(device, DTYPES[name], size) for name in dtypes}
    rates = {name: 2 * size**3 / min(seconds) for name, seconds in products.items()}
    if not cuda:
        rates = {name: max(rate, _conv_rate(DTYPES[name], tiny)) for name, rate in rates.items()}
    return Machine(
        device=torch.cuda.get_device_name() if cuda else cpu_name(),
        threads=None if cuda else torch.get_num_threads(),
        driver=driver_version() if cuda else "",
        torch=torch.__version__,
        triton=triton_version(),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        copy_gb_s=2 * copied / min(_copy_seconds(device, copied)) / 1e9,
        matmul_tflop_s={name: rate / 1e12 for name, rate in rates.items()},
        noise=Statistics.of(next(iter(products.values()))).spread,
        runtimes=_runtimes(),
    )


def check_device(device: str) -> None:
    """Raise ``InputError`` where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here")


def _runtimes() -> str:
    found = {name: package_version(name) for name in RUNTIME_PACKAGES}
    return ", ".join(f"{name} {at}" for name, at in found.items() if at != ABSENT)


def _copy_seconds(device: str, size: int) -> list[float]:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return _seconds(device, lambda: target.copy_(source))


def _matmul_seconds(device: str, dtype: torch.dtype, size: int) -> list[float]:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return _seconds(device, lambda: a @ b)


def _conv_rate(dtype: torch.dtype, tiny: bool) -> float:
    """FLOP/s of a convolution by oneDNN, which may exceed those of the matrix product by MKL."""
    if not has_onednn(dtype):
        return 0.0
    channels, height, width = (16, 8, 16) if tiny else (256, 64, 128)
    x = torch.randn(1, channels, height, width, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype)
    flops = 2 * 9 * channels**2 * height * width
    return flops / min(_seconds("cpu", lambda: F.conv2d(x, weight, padding=1)))


def _seconds(device: str, call: Call) -> list[float]:
    timer = events_timer(call) if device == "cuda" else wall_timer(call)
    times = Method(device, rounds=20, seconds=2).times({"": timer})[""]
    return [timed.warm if timed.cold is None else timed.cold for timed in times]
