"""EM attention in plain PyTorch: the specification that every kernel is held against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def em_attention(feats: Tensor, bases: Tensor, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """Run the batched EM iterations (Li et al., ICCV 2019, eq. 12-14; mmseg ``EMAModule``).

    Args:
        feats: features X, [B, C, N], floating point.
        bases: initial bases, [1 or B, C, K], of the same dtype.
        num_stages: number of E and M steps, at least 1.

    Returns:
        The reconstruction, [B, C, N], and the bases after the last M step, [B, C, K], in the
        dtype of ``feats``. No gradient flows through either. Half-precision inputs are computed
        in float32: a logit of a few hundred would leave nothing of a half-precision softmax.
    """
    with torch.no_grad(), torch.autocast(feats.device.type, enabled=False):
        dtype = torch.promote_types(feats.dtype, torch.float32)
        x = feats.to(dtype)
        mu = bases.to(dtype).expand(x.shape[0], -1, -1)
        for _ in range(num_stages):
            z = torch.softmax(x.transpose(1, 2) @ mu, dim=2)  # E step: responsibilities [B, N, K]
            mu = x @ F.normalize(z, p=1, dim=1)  # M step: bases [B, C, K]
            mu = F.normalize(mu, p=2, dim=1)
        recon = mu @ z.transpose(1, 2)  # [B, C, N]
    return recon.to(feats.dtype), mu.to(feats.dtype)
