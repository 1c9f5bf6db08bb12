"""The EM attention block with ``ema_mid_conv`` folded into the bases, in PyTorch.

The mid convolution is linear, X = W1 F + b1, so the EM steps run on F itself with the bases
nu = W1' mu and a logit bias b1' mu for each base, and X is never formed. With S and r the sums
of F and of 1 under the normalised responsibilities, the M step's bases are W1 S + b1 r. r is 1,
but 0 for a dead base, one that no position takes; without it such a base would become b1.
Two products with W1 a step take the place of the Gram matrix W1'W1, which would square the
condition number and have to be kept beside the weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-12  # the guard of both norms, as in torch.nn.functional.normalize
POSITIONS = 8192  # of a piece of the epilogue, so that its reconstruction stays small


@torch.no_grad()
def em_attention_block(
    feats: Tensor,
    bases: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_stages: int = 3,
) -> tuple[Tensor, Tensor]:
    """Run the block of ``reference.em_attention_block`` with the mid convolution folded away.

    Args:
        feats: features F, [B, N, C], any strides, floating point.
        bases: initial bases, [1 or B, C, K].
        mid_weight, mid_bias: ``ema_mid_conv``, [C, C] and [C].
        out_weight, out_bias: ``ema_out_conv`` with its batch norm folded in, [C, C] and [C].
        num_stages: number of E and M steps, at least 1.

    Returns:
        The block's output, [B, N, C] with the strides of ``empty_like(feats)``, and the bases
        after the last M step, [B, C, K], in the dtype of ``feats``. No gradient flows through
        either. Half-precision inputs are computed in float32. Each image is computed by itself.
    """
    dtype = torch.promote_types(feats.dtype, torch.float32)
    y = torch.empty_like(feats, dtype=dtype).copy_(feats)  # F, and in the end the output
    bases, w_mid, b_mid, w_out, b_out = (
        t.to(dtype) for t in (bases, mid_weight, mid_bias, out_weight, out_bias)
    )
    new_bases = feats.new_empty(len(feats), *bases.shape[1:])
    with torch.autocast(feats.device.type, enabled=False):
        for f, initial, final in zip(y.mT, bases.expand_as(new_bases), new_bases, strict=True):
            z, mu = _em(f, initial, w_mid, b_mid, num_stages)
            _epilogue_(f, z, mu, w_out, b_out)
            final.copy_(mu)
    return y.to(feats.dtype), new_bases


def _em(f: Tensor, mu: Tensor, w_mid: Tensor, b_mid: Tensor, num_stages: int) -> tuple:
    """The EM steps of one image: responsibilities [N, K] and bases [C, K]."""
    for _ in range(num_stages):
        z = torch.addmm(b_mid @ mu, f.T, w_mid.T @ mu).softmax(dim=1)  # [N, K]
        mass = z.sum(0)
        guarded = mass.clamp_min(EPS)
        mu = w_mid @ (f @ z / guarded) + torch.outer(b_mid, mass / guarded)
        mu = F.normalize(mu, dim=0)
    return z, mu


def _epilogue_(f: Tensor, z: Tensor, mu: Tensor, weight: Tensor, bias: Tensor) -> None:
    """F of one image, [C, N], becomes relu(F + weight relu(mu z') + bias) in place."""
    for piece, z_piece in zip(f.split(POSITIONS, 1), z.split(POSITIONS), strict=True):
        recon = (mu @ z_piece.T).relu_()
        piece.addmm_(weight, recon).add_(bias[:, None]).relu_()
