"""EMANet for semantic segmentation: published checkpoints, exact evaluation, Triton kernels."""

from emanet_triton.eval.inference import segment
from emanet_triton.models.fused import fuse
from emanet_triton.models.head import EMAttention

__all__ = ["EMAttention", "fuse", "segment"]
