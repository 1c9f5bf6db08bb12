"""mmsegmentation's ``EMAHead`` with this package's EM iterations."""

import torch
from mmseg.models.builder import MODELS
from mmseg.models.decode_heads import ema_head
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.em.op import em_attention


class EMAModule(ema_head.EMAModule):
    """mmsegmentation's ``EMAModule``: same buffer ``bases`` and same moving average.

    Shape:
        features [B, C, H, W], float32, float16 or bfloat16 → reconstruction of the same shape and
        dtype. No gradient flows through it, as in mmsegmentation.
    """

    bases: Tensor

    def forward(self, feats: Tensor) -> Tensor:
        recon, bases = em_attention(feats, self.bases, self.num_stages)
        if self.training:
            with torch.no_grad():
                mean = ema_head.reduce_mean(bases.mean(dim=0, keepdim=True))
                moved = self.momentum * F.normalize(mean, dim=1)
                self.bases = (1 - self.momentum) * self.bases + moved
        return recon


@MODELS.register_module(force=True)
class EMAHead(ema_head.EMAHead):
    """mmsegmentation's ``EMAHead``, whose arguments, weights and losses it keeps."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # The class alone changes: a new module would draw other random bases from the seed.
        self.ema_module.__class__ = EMAModule
