"""EM attention and its block in PyTorch, a piece of the positions at a time to fit CPU caches.

The block folds ``ema_mid_conv`` into the bases. That convolution is linear, X = W1 F + b1, so the
EM steps run on F itself with the bases nu = W1' mu and a logit bias b1' mu for each base, and X is
never formed. Let S and r be the sums of F and of 1, each weighted by the normalised
responsibilities. Then the M step's bases are W1 S + b1 r. r is 1, or 0 for a dead base, to which no
position belongs; without r a dead base would become b1. Two products with W1 in each step replace
the Gram matrix W1'W1, which would square the condition number and need memory beside the weights.

On a CPU the threads share the positions, and in the M step the bases. Threads wait for one another
only between steps, so one slow thread delays the others little. The shape alone decides the shares
and the order in which their sums are added, so the number of threads changes no bit of a result.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.threads import for_each

EPS = 1e-12  # the guard of both norms, as in torch.nn.functional.normalize
POSITIONS = 512  # positions of a piece on a CPU: 1 MB at 512 channels
WIDE = 8192  # positions of a piece on another device
SHARES = 64  # items of work into which the positions are split, at most
BASES = 16  # bases in one item of work on a CPU


@torch.no_grad()
def run_attention(feats: Tensor, bases: Tensor, num_stages: int = 3) -> tuple[Tensor, Tensor]:
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
            steps = _Steps(x, initial)
            steps.run(num_stages)
            steps.reconstruct(recon)
            final.copy_(steps.bases.T)
    return recons, new_bases


@torch.no_grad()
def run_block(
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
        The block's output and the bases, as ``run_attention`` returns them.
    """
    dtype = torch.promote_types(feats.dtype, torch.float32)
    y = torch.empty_like(feats, dtype=dtype).copy_(feats)  # F, and in the end the output
    w_mid, b_mid, w_out, b_out = (t.to(dtype) for t in (mid_weight, mid_bias, out_weight, out_bias))
    new_bases = feats.new_empty(len(feats), *bases.shape[1:])
    with torch.autocast(feats.device.type, enabled=False):
        for f, initial, final in zip(y, bases.expand_as(new_bases), new_bases, strict=True):
            steps = _Steps(f, initial, (w_mid, b_mid))
            steps.run(num_stages)
            steps.epilogue_(w_out, b_out)
            final.copy_(steps.bases.T)
    return y.to(feats.dtype), new_bases


class _Steps:
    """The EM steps, the reconstruction and the epilogue of one image, each shared among threads.

    Args:
        f: features, [N, C].
        bases: initial bases, [C, K].
        mid: weight and bias of the convolution that makes X from F; without it X is F.
    """

    def __init__(self, f: Tensor, bases: Tensor, mid: tuple[Tensor, Tensor] | None = None) -> None:
        cpu, dtype = f.device.type == "cpu", torch.promote_types(f.dtype, torch.float32)
        self.bases = bases.T.to(dtype, copy=True, memory_format=torch.contiguous_format)  # [K, C]
        self._f, self._mid = f, mid
        self._weight = self.bases if mid is None else torch.empty_like(self.bases)  # nu, [K, C]
        self._bias = None if mid is None else self.bases.new_empty(len(self.bases))  # of the logits
        self._z = self.bases.new_empty(len(f), len(self.bases))  # responsibilities, [N, K]
        self._shares = _shares(*self._z.shape) if cpu else [slice(0, len(f))]
        self._positions = POSITIONS if cpu else WIDE
        self._of_bases = _slices(len(self.bases), BASES if cpu else len(self.bases))
        self._sums = self.bases.new_empty(len(self._shares), *self.bases.shape)
        self._masses = self._sums.new_empty(self._sums.shape[:2])

    def run(self, num_stages: int) -> None:
        """Run E and M steps; they set ``bases`` and the responsibilities."""
        if self._mid is not None:
            self._share(lambda: self._fold, self._of_bases)
        for _ in range(num_stages):
            self._share(lambda: self._e_step, list(enumerate(self._shares)))
            self._share(lambda: self._m_step, self._of_bases)

    def reconstruct(self, out: Tensor) -> None:
        """Write the reconstruction of X to ``out``, [N, C]."""

        def run(share: slice) -> None:
            for piece in self._pieces(share):
                _product(self._z[piece], self.bases, out[piece])

        self._share(lambda: run, self._shares)

    def epilogue_(self, weight: Tensor, bias: Tensor) -> None:
        """F becomes relu(F + relu(z mu') weight' + bias) in place."""

        def make_run() -> Callable[[slice], None]:
            memory = self._f.new_empty(self._positions, self._f.shape[1])

            def run(share: slice) -> None:
                for piece in self._pieces(share):
                    z, f = self._z[piece], self._f[piece]
                    recon = torch.mm(z, self.bases, out=memory[: len(z)]).relu_()
                    f.addmm_(recon, weight.T).add_(bias).relu_()

            return run

        self._share(make_run, self._shares)

    def _fold(self, k: slice) -> None:
        """Compute the weight and the bias that give the logits of some bases."""
        if self._mid is not None and self._bias is not None:
            weight, bias = self._mid
            torch.mm(self.bases[k], weight, out=self._weight[k])
            torch.mv(self.bases[k], bias, out=self._bias[k])

    def _e_step(self, numbered: tuple[int, slice]) -> None:
        """Compute responsibilities z of a share of the positions, and the sums of z'F and of z."""
        i, share = numbered
        sums, mass = self._sums[i].zero_(), self._masses[i].zero_()
        for piece in self._pieces(share):
            f, z = self._f[piece].to(sums.dtype), self._z[piece]
            torch.mm(f, self._weight.T, out=z)
            if self._bias is not None:
                z += self._bias
            torch.softmax(z, 1, out=z)
            sums.addmm_(z.T, f)
            mass += z.sum(0)

    def _m_step(self, k: slice) -> None:
        """Compute bases k from the sums of all shares, and the weight and bias of their logits."""
        sums, mass = self._sums[:, k].sum(0), self._masses[:, k].sum(0)
        guarded = mass.clamp_min(EPS)
        new = sums / guarded[:, None]
        if self._mid is not None:
            weight, bias = self._mid
            new = new @ weight.T + torch.outer(mass / guarded, bias)
        self.bases[k] = F.normalize(new, dim=1)
        self._fold(k)

    def _pieces(self, share: slice) -> list[slice]:
        return _slices(share.stop, self._positions, share.start)

    def _share(self, make_run: Callable[[], Callable], items: list) -> None:
        for_each(make_run, items, self._f.device)


def _shares(positions: int, bases: int) -> list[slice]:
    """Slices of the positions, one per item of work.

    Each slice has at least 8 K positions, so that all partial sums stay small beside F.
    """
    least = max(8 * bases, -(-positions // SHARES))
    return _slices(positions, -(-least // POSITIONS) * POSITIONS)


def _slices(stop: int, size: int, start: int = 0) -> list[slice]:
    """Slices of ``size`` each; the last may be shorter."""
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
