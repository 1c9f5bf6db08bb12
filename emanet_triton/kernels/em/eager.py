"""EM attention and its block in PyTorch, a piece of the positions at a time to fit CPU caches.

The block folds ``ema_mid_conv`` into the bases. That convolution is linear, X = W1 F + b1, so the
EM steps run on F itself with the bases nu = W1' mu and a logit bias b1' mu for each base, and X is
never formed. Let S and r be the sums of F and of 1, each weighted by the normalised
responsibilities. Then the M step's bases are W1 S + b1 r. r is 1, or 0 for a dead base, to which no
position belongs; without r a dead base would become b1. A shift of the norms makes r a little less
than 1. Two products with W1 in each step replace the Gram matrix W1'W1, which would square the
condition number and need memory beside the weights.

On a CPU the threads share the positions, and the bases in the block's M step. Threads wait for one
another only between steps, so one slow thread delays the others little. The shape alone decides the
shares and the order in which their sums are added, so the number of threads changes no bit of a
result.

On a CPU no responsibility, no sum of them and no base is subnormal, whatever the logits. A
responsibility that could be becomes 0; it is below 2 K ``tiny`` (``softmax_without_subnormals``).
Both norms of a base are guarded by ``EPS``, so in one step N such zeros move a base by at most
4 N K ``tiny`` / ``EPS``^2 times the largest norm of a position of X: by 1.3e-5 for 8192 positions
of norm 500 and 64 bases. Only a base that is nearly dead moves so far. Responsibilities are stored
times ``SCALE``, so that the sums of the smallest ones are normal too, for features above 2^-41.
Components of a base below ``SMALLEST`` become 0, and the reconstruction leaves out responsibilities
below ``EPS``, which moves it by less than K ``EPS``.

If features and weights are bfloat16, oneDNN computes the block's last two products, the
reconstruction and the out convolution, from bfloat16 numbers with float32 sums, where the processor
has instructions for them. All else stays float32: bfloat16 would change logits of hundreds by whole
units, bases by several roundings of their own, and double the error of a reconstruction that is the
output.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.device import has_onednn
from emanet_triton.kernels.em.reference import EPS, normalised
from emanet_triton.kernels.products import onednn_beats_mkl, onednn_linear
from emanet_triton.kernels.softmax import softmax_without_subnormals
from emanet_triton.kernels.threads import for_each

SCALE = 2.0**40  # of stored responsibilities; a power of two, so it rounds nothing
SMALLEST = 2.0**-64  # component of a base; divided by SCALE it is normal
SHARE = 2048  # positions of an item of work on a CPU, about; fewer cost more calls of PyTorch
SHARES = 64  # items of work into which the positions are split, at most
POSITIONS = 1024  # positions of a piece on a CPU, at most: 2 MB at 512 channels
WIDE = 8192  # positions of a piece on another device
ALIGNMENT = 64  # bytes
CHAIN = 128  # channels that oneDNN sums at once for exact logits, at most
BASES = 32  # bases in one item of work on a CPU
CHANNELS = 64  # fewer are not multiplied in bfloat16: their roundings do not average out


@torch.no_grad()
def run_attention(
    feats: Tensor, bases: Tensor, num_stages: int = 3, norm_shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Run the EM iterations of ``reference.em_attention``.

    Args:
        feats: features X, [B, N, C], any strides, floating point.
        bases: initial bases, [1 or B, C, K].
        num_stages: number of E and M steps, at least 1.
        norm_shift: added to both norms of an M step.

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
            steps = _Steps(x, initial, norm_shift=norm_shift)
            steps.run(num_stages)
            _write(recon, steps.reconstruct)
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
    norm_shift: float = 0.0,
    out_relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the block of ``reference.em_attention_block`` with the mid convolution folded away.

    Args:
        feats: features F, [B, N, C], any strides, floating point.
        bases: initial bases, [1 or B, C, K].
        mid_weight, mid_bias: ``ema_mid_conv``, [C, C] and [C].
        out_weight, out_bias: ``ema_out_conv`` with its batch norm folded in, [C, C] and [C].
        num_stages, norm_shift: as in ``run_attention``.
        out_relu: whether a ReLU follows the out convolution.

    Returns:
        The block's output and the bases, in the layout and dtype of ``run_attention``'s results.
        Half-precision inputs are computed in float32, but for the products of bfloat16 above.
    """
    out = torch.empty_like(feats)
    new_bases = feats.new_empty(len(feats), *bases.shape[1:])
    with torch.autocast(feats.device.type, enabled=False):
        images = zip(feats, bases.expand_as(new_bases), out, new_bases, strict=True)
        for f, initial, y, final in images:
            steps = _Steps(f, initial, (mid_weight, mid_bias), norm_shift)
            steps.run(num_stages)
            _write(y, functools.partial(steps.epilogue, out_weight, out_bias, out_relu))
            final.copy_(steps.bases.T)
    return out, new_bases


class _Steps:
    """The EM steps, the reconstruction and the epilogue of one image, each shared among threads.

    Args:
        f: features, [N, C].
        bases: initial bases, [C, K].
        mid: weight and bias of the convolution that makes X from F; without it X is F.
        norm_shift: added to both norms of an M step.
    """

    def __init__(
        self,
        f: Tensor,
        bases: Tensor,
        mid: tuple[Tensor, Tensor] | None = None,
        norm_shift: float = 0.0,
    ) -> None:
        f = f if _is_aligned(f) else f.clone()
        cpu, self._dtype = f.device.type == "cpu", torch.promote_types(f.dtype, torch.float32)
        bases = bases.T.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        self.bases = bases  # [K, C]
        self._f = f
        self._mid, self._norm_shift = mid, norm_shift
        self._weight = bases if mid is None else torch.empty_like(bases)  # nu, [K, C]
        self._bias = None if mid is None else bases.new_empty(len(bases))  # of the logits
        self._z = bases.new_empty(len(f), len(bases))  # responsibilities times SCALE
        self._by_columns = f.stride(0) == 1 and not f.is_contiguous()
        self._is_exact = f.dtype == self._dtype  # rounded features need no exact logits
        self._by_onednn = onednn_beats_mkl(f.device) and has_onednn(self._dtype)
        self._is_last = False  # whether this is the last step
        self._shares = _shares(*self._z.shape) if cpu else [slice(0, len(f))]
        self._positions = POSITIONS if cpu else WIDE
        self._of_bases = _slices(len(bases), BASES if cpu else len(bases))
        self._sums = bases.new_empty(len(self._shares), *bases.shape)
        self._masses = self._sums.new_empty(self._sums.shape[:2])

    def run(self, num_stages: int) -> None:
        """Run E and M steps; they set ``bases`` and the responsibilities."""
        if self._mid is not None:
            self._share(lambda: self._read_mid, [self._mid])
            self._share(lambda: self._fold, self._of_bases)
        for stage in range(num_stages):
            self._is_last = stage == num_stages - 1
            if self._mid is None:
                self._share_step()
            else:
                self._share(lambda: self._e_step, list(enumerate(self._shares)))
                self._share(lambda: self._m_step, self._of_bases)

    def reconstruct(self, out: Tensor) -> None:
        """Write the reconstruction of X to ``out``, [N, C]."""

        def make_run() -> Callable:
            bases = self.bases / SCALE

            def run(share: slice) -> None:
                for piece in self._pieces(share):
                    z = self._responsibilities(piece)
                    if out.dtype == z.dtype and not self._by_onednn:
                        torch.mm(z, bases, out=out[piece])
                    else:
                        out[piece] = _linear(z, bases.T)

            return run

        self._share(make_run, self._shares)

    def epilogue(self, weight: Tensor, bias: Tensor, out_relu: bool, out: Tensor) -> None:
        """Write relu(F + relu(z mu') weight' + bias) to ``out``, [N, C].

        With ``out_relu`` another ReLU precedes the addition of F.
        """
        # oneDNN cannot add in place, but is faster for rows, and on some CPUs for columns too.
        in_bfloat16 = _multiplies_bfloat16(out, weight, bias)
        by_mkl = self._by_columns and out.dtype == self._dtype and not self._by_onednn
        in_place = in_bfloat16 or by_mkl
        make_run = self._add_in_place if in_place else self._add
        self._share(lambda: make_run(weight, bias, out_relu, out), self._shares)

    def _add(self, weight: Tensor, bias: Tensor, out_relu: bool, out: Tensor) -> Callable:
        """Make a function that computes the epilogue of a share."""
        bases, weight, bias = self.bases / SCALE, weight.to(self._dtype), bias.to(self._dtype)

        def run(share: slice) -> None:
            for piece in self._pieces(share):
                recon = _linear(self._responsibilities(piece), bases.T).relu_()
                product = _linear(recon, weight, bias)
                if out_relu:
                    product.relu_()
                torch.add(product, self._f[piece], out=out[piece]).relu_()

        return run

    def _add_in_place(self, weight: Tensor, bias: Tensor, out_relu: bool, out: Tensor) -> Callable:
        """Like ``_add``, but add in place; the final sum is rounded once, with ``out_relu`` twice.

        ``out_relu`` needs the product by itself, which ``out`` then holds in its own dtype.
        """
        bases, weight, bias = (t.to(out.dtype) for t in (self.bases / SCALE, weight, bias))
        weight = torch.cat([weight, bias[:, None]], 1)
        memory = out.new_ones(self._positions, weight.shape[1])  # a column of ones for the bias

        def run(share: slice) -> None:
            for piece in self._pieces(share):
                z = self._responsibilities(piece).to(out.dtype)
                recon = memory[: len(z)]
                torch.mm(z, bases, out=recon[:, :-1]).relu_()
                if out_relu:
                    product = torch.mm(recon, weight.T, out=out[piece]).relu_()
                    product.add_(self._f[piece]).relu_()
                else:
                    out[piece].copy_(self._f[piece]).addmm_(recon, weight.T).relu_()

        return run

    def _share_step(self) -> None:
        """Run an E step, and let the thread that ends it run the M step, which is short."""
        left = list(range(len(self._shares)))  # ``pop`` is atomic, and returns 0 last

        def run(numbered: tuple[int, slice]) -> None:
            self._e_step(numbered)
            if left.pop() == 0:
                self._m_step(slice(0, len(self.bases)))

        self._share(lambda: run, list(enumerate(self._shares)))

    def _read_mid(self, mid: tuple[Tensor, Tensor]) -> None:
        self._mid = mid[0].to(self._dtype), mid[1].to(self._dtype)

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
            f, z = self._features(piece), self._stored(piece)
            logits = self._logits(f)
            if self._by_columns:  # softmax would copy columns
                softmax_without_subnormals(logits.T, 0, out=z.T)
            else:
                softmax_without_subnormals(logits, 1, out=z)
            z *= SCALE
            if self._by_onednn:
                sums += onednn_linear(z.T, f.T)
            else:
                sums.addmm_(z.T, f)
            mass += z.sum(0)

    def _m_step(self, k: slice) -> None:
        """Compute bases k from the sums of all shares, and the weight and bias of their logits."""
        sums, mass = self._sums[:, k].sum(0), self._masses[:, k].sum(0)
        guarded = (mass + SCALE * self._norm_shift).clamp_min(SCALE * EPS)
        new = sums / guarded[:, None]
        if self._mid is not None:
            weight, bias = self._mid
            new = new @ weight.T + torch.outer(mass / guarded, bias)
        self.bases[k] = F.hardshrink(normalised(new, 2, self._norm_shift), SMALLEST)
        if not self._is_last:
            self._fold(k)

    def _logits(self, f: Tensor) -> Tensor:
        """The logits of a piece, [n, K], with memory in the order of F's, here [n, C]."""
        if self._is_exact and self._by_onednn:
            return _linear_in_chains(f, self._weight, self._bias)
        return _linear(f, self._weight, self._bias, exact=self._is_exact)

    def _features(self, piece: slice) -> Tensor:
        """F of a piece, [n, C], in the dtype of the EM steps, with its memory in the same order."""
        f = self._f[piece].T if self._by_columns else self._f[piece]
        f = f.to(self._dtype, memory_format=torch.contiguous_format)
        if self._by_onednn:
            f = f.contiguous()  # oneDNN is slow with a part of a matrix
        return f.T if self._by_columns else f

    def _stored(self, piece: slice) -> Tensor:
        """The stored responsibilities of a piece, [n, K], with memory in the order of F's."""
        z = self._z[piece]
        return z.view(z.shape[1], -1).T if self._by_columns else z

    def _responsibilities(self, piece: slice) -> Tensor:
        """The responsibilities of a piece that move the reconstruction, times ``SCALE``."""
        return F.threshold(self._stored(piece), SCALE * EPS, 0)

    def _pieces(self, share: slice) -> list[slice]:
        return _slices(share.stop, self._positions, share.start)

    def _share(self, make_run: Callable[[], Callable], items: list) -> None:
        for_each(make_run, items, self._f.device)


def _is_aligned(image: Tensor) -> bool:
    """Whether an image begins as PyTorch's own memory does.

    Elsewhere MKL rounds differently, and an image's bits would depend on its place in the batch.
    """
    return image.data_ptr() % ALIGNMENT == 0


def _write(image: Tensor, compute: Callable[[Tensor], None]) -> None:
    """Have ``compute`` write an image, or memory that begins as PyTorch's own does."""
    place = image if _is_aligned(image) else torch.empty_like(image)
    compute(place)
    if place is not image:
        image.copy_(place)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """x weight' + bias, [n, O], for x [n, I]. If the columns of x are contiguous, so are its.

    Without ``exact`` oneDNN computes it, which is faster but rounds more.
    """
    onednn = not exact and x.device.type == "cpu" and has_onednn(x.dtype)
    if x.stride(0) != 1 or x.is_contiguous():
        fast = onednn and x.is_contiguous()
        return onednn_linear(x, weight, bias) if fast else F.linear(x, weight, bias)
    out = onednn_linear(weight, x) if onednn and x.T.is_contiguous() else torch.mm(weight, x.T)
    return (out if bias is None else out.add_(bias[:, None])).T


def _linear_in_chains(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``_linear`` by oneDNN, of at most ``CHAIN`` channels at once, to round about as much as MKL.

    oneDNN adds the products of an element one after the other.
    """
    by_columns = x.stride(0) == 1 and not x.is_contiguous()
    first, *others = (  # each product of whole matrices: oneDNN is slow with a part of one
        _linear(
            x[:, chain] if by_columns else x[:, chain].contiguous(), weight[:, chain].contiguous()
        )
        for chain in _slices(x.shape[1], CHAIN)
    )
    for other in others:
        first += other
    return first if bias is None else first.add_(bias)


def _multiplies_bfloat16(out: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the block's last two products multiply bfloat16 numbers."""
    kinds = {(t.device.type, t.dtype) for t in (out, weight, bias)}
    enough = len(bias) >= CHANNELS and has_onednn(torch.bfloat16)
    return kinds == {("cpu", torch.bfloat16)} and enough


def _shares(positions: int, bases: int) -> list[slice]:
    """Slices of the positions, one per item of work: at most about N / (8 K) + 1.

    Two, four or eight threads get equally many of them, as their number is a power of two.
    """
    count = min(2 ** max(round(math.log2(positions / SHARE)), 1), SHARES)
    return _slices(positions, max(-(-positions // (16 * count)) * 16, 8 * bases))


def _slices(stop: int, most: int, start: int = 0) -> list[slice]:
    """As few slices as possible of at most ``most``, of nearly equal multiples of 16."""
    count = -(-(stop - start) // most)
    size = min(-(-(stop - start) // (16 * count)) * 16, most)
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]
