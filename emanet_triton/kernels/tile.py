"""The tile of a kernel: its block sizes and launch options for one architecture and dtype."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PRECISIONS = ("ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class Tile:
    """One configuration of one kernel.

    Attributes:
        kernel: name of the ``@triton.jit`` function.
        arch: one of ``ARCHS``.
        dtype: of the features or images, a key of ``device.DTYPES``.
        meta: compile-time arguments of the kernel.
        num_warps, num_stages: launch options.
    """

    kernel: str
    arch: str
    dtype: str
    meta: Mapping[str, int | bool | str] = field(hash=False)
    num_warps: int
    num_stages: int
