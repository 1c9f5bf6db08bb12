"""What is installed, what the GPU and the CPU can do, and how kernels are imported."""

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from emanet_triton.heap import LARGE_PAGES

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# capability → the function of torch.cpu that says whether the CPU has it, best first
CPU_QUERIES = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}


@functools.cache
def gpu_arch(device: torch.device) -> str:
    """The architecture whose tiles a device uses; on a CPU the interpreter uses ``sm_90``'s."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def gluon_arch(x: Tensor) -> str:
    """The architecture of a tensor's GPU; a CPU has none, as Triton's interpreter runs no Gluon."""
    return gpu_arch(x.device) if x.device.type in ("cuda", "meta") else x.device.type


def has_gluon(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our kernels in Gluon can run: on a Hopper GPU, in half precision."""
    if not HAS_TRITON or device.type != "cuda":
        return False
    return dtype != torch.float32 and gpu_arch(device) == "sm_90"


@functools.cache
def cpu_capability() -> str:
    """The best instructions that PyTorch finds on this CPU, by name.

    Returns:
        "amx" (products of bf16 and int8 tiles), "avx512_bf16" (products of bf16 vectors),
        "avx512", "avx2", "arm", or "default" for any other CPU. PyTorch's environment variable
        ``ATEN_CPU_CAPABILITY`` can lower it to "avx2" or "default".
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "arm"
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    if vectors != "avx512":
        return "avx2" if vectors == "avx2" else "default"
    for name, query in CPU_QUERIES.items():
        if getattr(torch.cpu, query, bool)():  # ``bool()`` is False: an older PyTorch cannot tell
            return name
    return vectors


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` at full speed on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:  # AVX512 alone imitates it, more slowly than float32
        return cpu_capability() != "avx512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for the meta device 132, as an H100 or H200 with SXM has."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def cpu_family() -> tuple[str, int] | None:
    """Vendor and family of an x86 processor, such as ("AuthenticAMD", 26); Linux alone tells."""
    vendors, families = _cpuinfo("vendor_id"), _cpuinfo("cpu family")
    return (vendors[0], int(families[0])) if vendors and families else None


def _cpuinfo(field: str) -> list[str]:
    """What Linux says of each core; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == field]


def processor_name() -> str:
    """Name, family and number of cores, such as "AMD EPYC, family 26, 2 cores".

    A hypervisor may give the same name to processors of several families.
    """
    names = _cpuinfo("model name")
    name = names[0] if names else platform.processor() or "unknown processor"
    family = cpu_family()
    number = f", family {family[1]}" if family else ""
    return f"{name}{number}, {len(names) or os.cpu_count()} cores"


def cpu_name() -> str:
    """The processor's name, family, cores and best instructions, and settings that change times.

    The family only where Linux tells it. The settings are how OpenMP's threads wait, if the
    environment says so, and the size of pages, if it forbids large ones.
    """
    policy, pages = os.environ.get("OMP_WAIT_POLICY"), os.environ.get(LARGE_PAGES)
    waits = f", OMP_WAIT_POLICY={policy.lower()}" if policy else ""
    small = f", {LARGE_PAGES}={pages}" if pages not in (None, "1") else ""
    return f"{processor_name()}, {cpu_capability().upper().replace('_', '-')}{waits}{small}"


def auto_backend(on_gpu: bool) -> str:
    """What ``"auto"`` means to an operator that has the backends "triton" and "torch"."""
    return "triton" if HAS_TRITON and on_gpu else "torch"


@contextlib.contextmanager
def triton_kernels(stem: str, tensor: Tensor) -> Iterator[ModuleType]:
    """Import the module ``emanet_triton.kernels.<stem>`` and make the tensor's device current.

    Args:
        stem: a module of Triton kernels. Its ``INTERPRETED`` says whether Triton's interpreter
            runs them.
        tensor: the kernels' main input, on the device and in the dtype of the computation.

    Raises:
        ValueError: Triton is not installed, or cannot run on this device or with this dtype.
    """
    if not HAS_TRITON:
        raise ValueError("backend 'triton' needs the package triton, which is not installed")
    kernels = importlib.import_module(f"emanet_triton.kernels.{stem}")
    if not (tensor.is_cuda or kernels.INTERPRETED):
        raise ValueError(
            "backend 'triton' needs tensors on a GPU, or TRITON_INTERPRET=1 set in the "
            f"environment before triton is imported; got tensors on {tensor.device}"
        )
    if kernels.INTERPRETED and tensor.dtype == torch.bfloat16:  # it multiplies the bit patterns
        raise ValueError(
            "backend 'triton' is wrong for bfloat16 in Triton's interpreter; take another "
            "backend or dtype, or unset TRITON_INTERPRET on a GPU"
        )
    with current_device(tensor.device):
        yield kernels


def current_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which a GPU is the current device; on a CPU it does nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is recorded on a device's current stream."""
    with current_device(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
