"""The tile of a kernel: its block sizes and launch options for one architecture and dtype."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
FP32_PRECISIONS = ("ieee", "tf32x3", "tf32")


@dataclass(frozen=True)
class Tile:
    """One configuration of one kernel.

    Attributes:
        kernel: name of the ``@triton.jit`` function.
        arch: one of ``ARCHS``.
        dtype: of the features or images, a key of ``device.DTYPES``.
        meta: compile-time arguments of the kernel: block sizes and the precision.
        num_warps, pipeline_stages: launch options; Triton calls the second ``num_stages``.
    """

    kernel: str
    arch: str
    dtype: str
    meta: Mapping[str, Any] = field(hash=False)
    num_warps: int
    pipeline_stages: int

    def keywords(self) -> dict[str, Any]:
        """What a launch takes of it."""
        return {
            **self.meta,
            "num_warps": self.num_warps,
            "num_stages": self.pipeline_stages,
            "enable_fp_fusion": True,
        }
