"""Inputs and the tolerance that the tests of EM attention and of its block share."""

import contextlib
from dataclasses import dataclass

import torch
from device import DEVICE, NATIVE
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.gpu_check.tf32 import CutOperands


@dataclass(frozen=True)
class Case:
    """Sizes and layout of one call: "last" and "first" are [B, N, C], the others [B, C, H, W]."""

    batch: int
    channels: int
    positions: tuple[int, int]
    bases: int
    layout: str = "last"
    stages: int = 3
    own_bases: bool = False  # a set of bases for each image

    def __str__(self) -> str:
        height, width = self.positions
        sizes = f"B{self.batch}-C{self.channels}-N{height * width}-K{self.bases}"
        return f"{sizes}-{self.layout}-T{self.stages}"

    def feats(self, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        height, width = self.positions
        shape = (self.batch, height * width, self.channels)
        x = scale * torch.randn(shape, generator=generator(0))
        x = x.to(DEVICE, dtype)
        image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        match self.layout:
            case "last":
                return x
            case "first":
                return x.mT.contiguous().mT
            case "nchw":
                return image.contiguous()
            case "channels_last":
                return image
            case "sliced":  # an offset, and strides of which none is 1
                wide = x.new_full((*shape[:2], 2 * self.channels + 3), float("nan"))
                wide[..., 3::2] = x
                return wide[..., 3::2]
            case "cropped":  # positions that no single stride reaches
                padded = F.pad(image.contiguous(), (1, 2, 3, 0), value=float("nan"))
                return padded[..., 3:, 1:-2]
        raise ValueError(self.layout)

    def initial_bases(self, dtype: torch.dtype) -> Tensor:
        batch = self.batch if self.own_bases else 1
        bases = torch.randn(batch, self.channels, self.bases, generator=generator(1))
        return F.normalize(bases, dim=1).to(DEVICE, dtype)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """mid_weight, mid_bias, out_weight, out_bias."""
        c = self.channels
        draw = generator(2)
        weights = [torch.randn(shape, generator=draw) for shape in ((c, c), (c,), (c, c), (c,))]
        gains = (c**-0.5, 0.5, c**-0.5, 0.5)
        return tuple((g * w).to(DEVICE, dtype) for g, w in zip(gains, weights, strict=True))


def common_case(batch: int = 1, layout: str = "last", stages: int = 3) -> Case:
    """The sizes of every test that needs no special ones: a GPU compiles kernels for each size.

    The positions fill several tiles and splits; the bases and channels fill less than a tile.
    """
    return Case(batch, 48, (9, 37), 7, layout, stages)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def channels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] or [B, N, C] → [B, C, N], the layout of the reference."""
    return x.flatten(2) if x.dim() == 4 else x.mT


def eager_em_attention(
    x: Tensor, mu: Tensor, num_stages: int, norm_shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """mmseg's operations on [B, C, N], on the CPU, all in the dtype of the input.

    A shift is added to both norms in place of the guard, as in the official EMANet. On a GPU the
    sums of small problems may be several times as exact as the CPU's and the kernels'.
    """
    x, mu = x.cpu(), mu.cpu()
    for _ in range(num_stages):
        z = torch.softmax(x.mT @ mu, dim=2)
        if norm_shift:
            mu = x @ (z / (norm_shift + z.sum(1, keepdim=True)))
            mu = mu / (norm_shift + mu.norm(dim=1, keepdim=True))
        else:
            mu = F.normalize(x @ F.normalize(z, p=1, dim=1), p=2, dim=1)
    return mu @ z.mT, mu


def eager_block(
    feats: Tensor,
    mu: Tensor,
    weights: tuple[Tensor, ...],
    num_stages: int,
    norm_shift: float = 0.0,
    out_relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """mmseg's operations around the EM attention, on [B, C, N], on the CPU."""
    feats, *weights = (t.cpu() for t in (feats, *weights))
    mid_weight, mid_bias, out_weight, out_bias = weights
    x = mid_weight @ feats + mid_bias[:, None]
    recon, mu = eager_em_attention(x, mu, num_stages, norm_shift)
    if out_relu:
        return F.relu(feats + F.relu(out_weight @ F.relu(recon) + out_bias[:, None])), mu
    return F.relu(feats + out_weight @ F.relu(recon) + out_bias[:, None]), mu


def plain_products(precision: str) -> contextlib.AbstractContextManager:
    """A context in which plain PyTorch multiplies float32 as the kernels do on a GPU."""
    return CutOperands() if NATIVE and precision == "tf32" else contextlib.nullcontext()


def assert_as_exact(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice plain PyTorch's error in the same dtype, and a few ulp."""
    got, plain, exact = got.cpu(), plain.cpu(), exact.cpu()
    assert got.dtype == plain.dtype
    assert got.shape == exact.shape
    error, allowed = ((t.double() - exact).abs().max().item() for t in (got, plain))
    ulps = 4 if got.dtype == torch.float32 else 2
    floor = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item()
    assert error <= 2 * allowed + floor, f"error {error:.3g}, plain PyTorch's {allowed:.3g}"


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with others between them."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
