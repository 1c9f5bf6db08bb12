"""EMANet for semantic segmentation: published checkpoints, exact evaluation, Triton kernels.

Attributes:
    MEAN: (123.675, 116.28, 103.53), of the RGB values 0 to 255 (mmseg ``img_norm_cfg``).
    STD: (58.395, 57.12, 57.375), likewise. They are mmsegmentation's. A network gets
        (image - model.mean) / model.std.
"""

from emanet_triton import old_paths
from emanet_triton._version import __version__
from emanet_triton.data.dataset import Dataset
from emanet_triton.data.description import open_dataset
from emanet_triton.data.overlay import class_names, overlay, palette
from emanet_triton.deploy.export import export
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.quantize import quantize
from emanet_triton.inference.segment import segment
from emanet_triton.kernels.em.op import em_attention, em_attention_block
from emanet_triton.models.fused import fuse
from emanet_triton.models.head import EMAHead, EMAttention, EMAUnit
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import create_model, list_models, model_info

MEAN, STD = Network.mean, Network.std

old_paths.install()

__all__ = [
    "MEAN",
    "STD",
    "Dataset",
    "EMAHead",
    "EMAUnit",
    "EMAttention",
    "Predictor",
    "Protocol",
    "__version__",
    "class_names",
    "create_model",
    "em_attention",
    "em_attention_block",
    "export",
    "fuse",
    "list_models",
    "model_info",
    "open_dataset",
    "overlay",
    "palette",
    "quantize",
    "segment",
]
