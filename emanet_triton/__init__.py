"""EMANet for semantic segmentation: published checkpoints, exact evaluation, Triton kernels."""

from emanet_triton import old_paths
from emanet_triton._version import __version__
from emanet_triton.inference.segment import segment
from emanet_triton.kernels.em.op import em_attention, em_attention_block
from emanet_triton.models.fused import fuse
from emanet_triton.models.head import EMAttention
from emanet_triton.models.zoo import create_model, list_models

old_paths.install()

__all__ = [
    "EMAttention",
    "__version__",
    "create_model",
    "em_attention",
    "em_attention_block",
    "fuse",
    "list_models",
    "segment",
]
