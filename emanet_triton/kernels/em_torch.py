"""EM attention and its block in PyTorch, by pieces of the positions, which stay in a CPU's caches.

The block folds ``ema_mid_conv`` into the bases. That convolution is linear, X = W1 F + b1, so the
EM steps run on F itself with the bases nu = W1' mu and a logit bias b1' mu for each base, and X is
never formed. With S and r the sums of F and of 1 under the normalised responsibilities, the M
step's bases are W1 S + b1 r. r is 1, but 0 for a dead base, one that no position takes; without it
such a base would become b1. Two products with W1 a step take the place of the Gram matrix W1'W1,
which would square the condition number and have to be kept beside the weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-12  # the guard of both norms, as in torch.nn.functional.normalize
POSITIONS = 2048  # of a piece: at 512 channels 4 MB
WIDE = 8192  # positions of a piece of the epilogue: fewer are slower there


@torch.no_grad()
def em_attention(feats: Tensor, bases: Tensor, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """Run the EM iterations of ``reference.em_attention``.

    Args:
        feats: features X, [B, N, C], any strides, floating point.
        bases: initial bases, [1 or B, C, K].
        num_stages: number of E and M steps, at least 1.

    Returns:
        The reconstruction, [B, N, C] with the strides of ``empty_like(feats)``, and the bases
        after the last M step, [B, C, K], in the dtype of ``feats``. No gradient flows through
        either. Half-precision inputs are computed in float32. Each image is computed by itself.
    """
    recons = torch.empty_like(feats)
    new_bases = feats.new_empty(len(feats), *bases.shape[1:])
    with torch.autocast(feats.device.type, enabled=False):
        images = zip(feats, bases.expand_as(new_bases), recons, new_bases, strict=True)
        for x, initial, recon, final in images:
            z, mu = _em(x, initial, num_stages)
            rows = mu.T.contiguous()
            for z_piece, out in zip(z.split(POSITIONS), recon.split(POSITIONS), strict=True):
                _product(z_piece, rows, out)
            final.copy_(mu)
    return recons, new_bases


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
        The block's output and the bases, as of ``em_attention``.
    """
    dtype = torch.promote_types(feats.dtype, torch.float32)
    y = torch.empty_like(feats, dtype=dtype).copy_(feats)  # F, and in the end the output
    w_mid, b_mid, w_out, b_out = (t.to(dtype) for t in (mid_weight, mid_bias, out_weight, out_bias))
    new_bases = feats.new_empty(len(feats), *bases.shape[1:])
    with torch.autocast(feats.device.type, enabled=False):
        for f, initial, final in zip(y, bases.expand_as(new_bases), new_bases, strict=True):
            z, mu = _em(f, initial, num_stages, (w_mid, b_mid))
            _epilogue_(f, z, mu, w_out, b_out)
            final.copy_(mu)
    return y.to(feats.dtype), new_bases


def _em(
    f: Tensor, mu: Tensor, num_stages: int, mid: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The EM steps of one image, [N, C]: responsibilities [N, K] and bases [C, K].

    ``mid`` is the weight and the bias of the convolution of which X is the output.
    """
    mu = mu.to(torch.promote_types(f.dtype, torch.float32))
    z = mu.new_empty(len(f), mu.shape[1])
    for _ in range(num_stages):
        weight, bias = (mu, None) if mid is None else (mid[0].T @ mu, mid[1] @ mu)
        sums, mass = _step(f, weight, bias, z)
        guarded = mass.clamp_min(EPS)
        mu = sums / guarded
        if mid is not None:
            mu = mid[0] @ mu + torch.outer(mid[1], mass / guarded)
        mu = F.normalize(mu, dim=0)
    return z, mu


def _step(f: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """Responsibilities of the features, into ``z``, and under them their sums [C, K] and mass [K].

    The softmax is that of F weight + bias, [N, K].
    """
    rows = weight.T.contiguous()  # a product with its transpose is the faster
    sums, mass = torch.zeros_like(weight), weight.new_zeros(weight.shape[1])
    for f_piece, z_piece in zip(f.split(POSITIONS), z.split(POSITIONS), strict=True):
        f_piece = f_piece.to(z.dtype)
        torch.mm(f_piece, rows.T, out=z_piece)
        if bias is not None:
            z_piece += bias
        torch.softmax(z_piece, 1, out=z_piece)
        sums += f_piece.T @ z_piece
        mass += z_piece.sum(0)
    return sums, mass


def _epilogue_(f: Tensor, z: Tensor, mu: Tensor, weight: Tensor, bias: Tensor) -> None:
    """F of one image, [N, C], becomes relu(F + relu(z mu') weight' + bias) in place."""
    for piece, z_piece in zip(f.T.split(WIDE, 1), z.split(WIDE), strict=True):
        recon = (mu @ z_piece.T).relu_()
        piece.addmm_(weight, recon).add_(bias[:, None]).relu_()


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
