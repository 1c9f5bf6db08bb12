"""A step: the state of the GPU, and the versions of all that runs on it."""

import json
import shutil
import subprocess
from collections.abc import Sequence

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.kernels.cache import driver_version
from emanet_triton.kernels.device import cpu_name
from emanet_triton.versions import ABSENT, commit, package_version
from emanet_triton.versions import versions as software

PACKAGES = ("triton", "pytest", "pytest-xdist")
QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,memory.free,mig.mode.current"
)
TOOLS = ("nvidia-smi", "ncu", "compute-sanitizer", "gcc")


def main(arguments: Sequence[str]) -> int:
    """Write ``versions.json``, and print it."""
    options = own.StepParser("versions", __doc__, measures=False).parse(arguments)
    found = json.dumps(versions(), indent=1)
    (options.out / own.VERSIONS).write_text(f"{found}\n")
    print(found)
    return 0


def versions() -> dict[str, object]:
    """All versions by name; ``ABSENT`` for what is not installed."""
    return {
        **software(),
        **{name: package_version(name) for name in PACKAGES},
        "cudnn": torch.backends.cudnn.version() or ABSENT,
        "driver": driver_version(),
        "commit": commit(),
        "processor": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else ABSENT,
        "nvidia-smi": _nvidia_smi(),
        "tools": {name: shutil.which(name) or ABSENT for name in TOOLS},
    }


def _first_gpu() -> str:
    """What nvidia-smi calls PyTorch's first GPU; it ignores ``CUDA_VISIBLE_DEVICES``."""
    if not torch.cuda.is_available():
        return "0"
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def _nvidia_smi() -> dict[str, str] | str:
    """The state of PyTorch's first GPU by name, or why it is not known."""
    if not shutil.which("nvidia-smi"):
        return ABSENT
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id", _first_gpu()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "failed: no answer"
    if done.returncode:
        return f"failed: {(done.stdout + done.stderr).strip()}"
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))


if __name__ == "__main__":
    own.run_main(main)
