"""A step: the GPU, its clocks, and the versions of everything."""

import json
import shutil
import subprocess
from collections.abc import Sequence

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.machine import commit, cpu_name
from emanet_triton.kernels.cache import driver_version
from emanet_triton.versions import package_version
from emanet_triton.versions import versions as software

PACKAGES = ("triton", "pytest", "pytest-xdist")
QUERY = (
    "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total,memory.free,mig.mode.current"
)
TOOLS = ("nvidia-smi", "ncu", "compute-sanitizer", "gcc")


def main(arguments: Sequence[str]) -> int:
    """Write what there is to ``versions.json``."""
    options = own.parser("versions", __doc__, measures=False).parse_args(arguments)
    found = versions()
    (options.out / own.VERSIONS).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def versions() -> dict[str, object]:
    """Everything by name; what is not here is "absent"."""
    return {
        **software(),
        **{name: package_version(name) for name in PACKAGES},
        "cudnn": torch.backends.cudnn.version() or "absent",
        "driver": driver_version(),
        "commit": commit(),
        "processor": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "absent",
        "nvidia-smi": _nvidia_smi(),
        "tools": {name: shutil.which(name) or "absent" for name in TOOLS},
    }


def _nvidia_smi() -> dict[str, str] | str:
    """What it says of the first GPU."""
    if not shutil.which("nvidia-smi"):
        return "absent"
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return "failed: no answer"
    if done.returncode:
        return f"failed: {(done.stdout + done.stderr).strip()}"
    return dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))


if __name__ == "__main__":
    own.run_main(main)
