"""Where the kernels' tests run: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from emanet_triton.kernels.device import gpu_arch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = DEVICE != "cpu"  # the kernels are compiled, not interpreted
ARCH = gpu_arch(torch.device(DEVICE))  # its tiles run unless a test asks for others

# bfloat16 is wrong in Triton's interpreter, so it is tested on a GPU only. Tests of many shapes
# take one half precision, since a GPU compiles every shape anew for each.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if NATIVE else ())
HALF = DTYPES[-1]


def only_on(*archs: str) -> pytest.MarkDecorator:
    """Skips a test on a GPU that is of none of these architectures."""
    reason = f"needs a GPU of {' or '.join(archs)}, and this one is of {ARCH}"
    return pytest.mark.skipif(NATIVE and ARCH not in archs, reason=reason)


def tiles_of(*archs: str) -> list:
    """Architectures as parameters; a GPU skips those whose tiles it cannot run."""
    can_run = {"sm_80": ("sm_80", "sm_90", "sm_100")}
    return [pytest.param(arch, marks=only_on(*can_run.get(arch, (arch,)))) for arch in archs]
