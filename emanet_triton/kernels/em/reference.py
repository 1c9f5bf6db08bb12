"""EM attention and its block in plain PyTorch, [B, C, N]: the specification of the kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.precision import without_autocast

EPS = 1e-12  # the guard of both norms, as in torch.nn.functional.normalize


def em_attention(
    feats: Tensor, bases: Tensor, num_stages: int = 3, norm_shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run the batched EM iterations (Li et al., ICCV 2019, eq. 12-14; mmseg ``EMAModule``).

    Args:
        feats: features X, [B, C, N], floating point.
        bases: initial bases, [1 or B, C, K], of the same dtype.
        num_stages: number of E and M steps, at least 1.
        norm_shift: added to both norms of an M step, at least 0. The authors' EMANet adds 1e-6.

    Returns:
        The reconstruction, [B, C, N], and the bases after the last M step, [B, C, K], in the
        dtype of ``feats``. No gradient flows through either. Half-precision inputs are computed
        in float32: logits reach a few hundred, too much for a softmax in half precision.
    """
    with torch.no_grad(), without_autocast(feats.device.type):
        dtype = torch.promote_types(feats.dtype, torch.float32)
        x = feats.to(dtype)
        mu = bases.to(dtype).expand(x.shape[0], -1, -1)
        for _ in range(num_stages):
            z = torch.softmax(x.transpose(1, 2) @ mu, dim=2)  # E step: responsibilities [B, N, K]
            mu = x @ normalised(z, 1, norm_shift)  # M step: bases [B, C, K]
            mu = normalised(mu, 2, norm_shift)
        recon = mu @ z.transpose(1, 2)  # [B, C, N]
    return recon.to(feats.dtype), mu.to(feats.dtype)


def normalised(x: Tensor, p: int, shift: float) -> Tensor:
    """x / (L1 or L2 norm over dim 1 + shift), as torch.nn.functional.normalize if shift is 0."""
    norm = x.norm(p, dim=1, keepdim=True)
    if shift:  # so that an exported program adds no zero
        norm = norm + shift
    return x / norm.clamp_min(EPS)


def em_attention_block(
    feats: Tensor,
    bases: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_stages: int = 3,
    norm_shift: float = 0.0,
    out_relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run EM attention with the 1x1 convolutions and the residual around it (mmseg ``EMAHead``).

    Args:
        feats: features F, [B, C, N], floating point.
        bases: initial bases, [1 or B, C, K].
        mid_weight, mid_bias: ``ema_mid_conv``, [C, C] and [C].
        out_weight, out_bias: ``ema_out_conv`` with its batch norm folded in, [C, C] and [C].
        num_stages, norm_shift: as in ``em_attention``.
        out_relu: whether a ReLU follows the out convolution, as in PaddleSeg's EMANet.

    Returns:
        relu(F + out(relu(reconstruction of mid(F)))), [B, C, N], and the bases after the last
        M step, [B, C, K], in the dtype of ``feats``. No gradient flows through either.
        Half-precision inputs are computed in float32.
    """
    with torch.no_grad(), without_autocast(feats.device.type):
        dtype = torch.promote_types(feats.dtype, torch.float32)
        f, bases, mid_weight, mid_bias, out_weight, out_bias = (
            t.to(dtype) for t in (feats, bases, mid_weight, mid_bias, out_weight, out_bias)
        )
        x = mid_weight @ f + mid_bias[:, None]  # [B, C, N]
        recon, mu = em_attention(x, bases, num_stages, norm_shift)
        if out_relu:
            out = F.relu(f + F.relu(out_weight @ F.relu(recon) + out_bias[:, None]))
        else:
            out = F.relu(f + out_weight @ F.relu(recon) + out_bias[:, None])
    return out.to(feats.dtype), mu.to(feats.dtype)
