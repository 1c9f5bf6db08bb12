"""What the EM benchmarks share: mmseg's operations, inputs, the correctness gate and the rows."""

import csv
import datetime
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels import reference

# Positions: height and width of the feature map they come from.
SIZES = {8192: (64, 128), 9409: (97, 97), 32768: (128, 256), 131072: (256, 512)}
BN_EPS = 1e-5


@dataclass(frozen=True)
class Problem:
    """The inputs of one EM attention block, all of one dtype and device."""

    feats: Tensor  # [B, C, H, W]
    bases: Tensor  # [1, C, K]
    mid_weight: Tensor  # [C, C, 1, 1]
    mid_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C, 1, 1], without the batch norm
    bn: tuple[Tensor, Tensor, Tensor, Tensor]  # running mean and variance, weight, bias: [C]

    def block_arguments(self) -> tuple[Tensor, ...]:
        """feats, bases and the weights of the block, the batch norm folded in."""
        mean, var, weight, bias = (t.double() for t in self.bn)
        scale = weight / torch.sqrt(var + BN_EPS)
        out_weight = self.out_weight[:, :, 0, 0].double() * scale[:, None]
        folded = (out_weight, bias - mean * scale)
        out_weight, out_bias = (t.to(self.feats.dtype) for t in folded)
        return (
            *(self.feats, self.bases, self.mid_weight[:, :, 0, 0], self.mid_bias),
            *(out_weight, out_bias),
        )


def make_problem(
    batch: int,
    size: tuple[int, int],
    channels: int = 512,
    bases: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> Problem:
    """Features as after a ReLU and layers of an ordinary scale, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tensors = [
        normal(batch, channels, *size).relu_(),
        F.normalize(normal(1, channels, bases), dim=1),
        2 * normal(channels, channels, 1, 1) / channels**0.5,
        normal(channels),
        normal(channels, channels, 1, 1) / channels**0.5,
        *(normal(channels), 0.5 + normal(channels).abs(), normal(channels), normal(channels)),
    ]
    feats, *rest = (t.to(device, dtype) for t in tensors)
    return Problem(feats.contiguous(memory_format=memory_format), *rest[:4], tuple(rest[4:]))


def mmseg_attention(x: Tensor, bases: Tensor, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """The operations of mmseg's ``EMAModule`` in evaluation, in its order."""
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height * width)
    bases = bases.repeat(batch, 1, 1)
    for _ in range(num_stages):
        attention = torch.einsum("bcn,bck->bnk", x, bases)
        attention = F.softmax(attention, dim=2)
        attention_normed = F.normalize(attention, dim=1, p=1)
        bases = torch.einsum("bcn,bnk->bck", x, attention_normed)
        bases = F.normalize(bases, dim=1, p=2)
    recon = torch.einsum("bck,bnk->bcn", bases, attention)
    return recon.view(batch, channels, height, width), bases


def mmseg_block(problem: Problem, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """The operations of mmseg's ``EMAHead`` from ema_mid_conv to the residual's ReLU."""
    x = F.conv2d(problem.feats, problem.mid_weight, problem.mid_bias)
    recon, bases = mmseg_attention(x, problem.bases, num_stages)
    recon = F.relu(recon, inplace=True)
    recon = F.batch_norm(F.conv2d(recon, problem.out_weight), *problem.bn, eps=BN_EPS)
    return F.relu(problem.feats + recon, inplace=True), bases


def float64_block(problem: Problem, image: int = 0) -> tuple[Tensor, Tensor]:
    """The specification in float64 on one image: [1, C, N] and [1, C, K]."""
    feats, *rest = (t.double() for t in problem.block_arguments())
    return reference.em_attention_block(feats[image : image + 1].flatten(2), *rest)


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], image: int = 0) -> float:
    """The largest difference of an image's tensors, over the largest magnitude wanted.

    Not a number, and so not below any bound, where ``got`` holds one that is not finite.
    """
    errors = []
    for g, w in zip(got, want, strict=True):
        difference = (g[image].reshape(w[0].shape).double() - w[0]).abs().max()
        errors.append((difference / w.abs().max()).item())
    return sum(errors) if any(e != e for e in errors) else max(errors)


def passes(error: float, plain_error: float, atol: float = 1e-6) -> bool:
    """The three-way tolerance: at most twice what plain PyTorch in the same dtype makes."""
    return error <= 2 * plain_error + atol


def alternate(
    providers: dict[str, Callable[[], object]], clock: Callable[[Callable], float], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every provider, one call each a round, in an order that turns round."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for call in providers.values():
        call()
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            times[name].append(clock(providers[name]))
    return times


def summary(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in ms, and how many times faster than the baseline of the same round."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    ratio = statistics.median(b / t for t, b in zip(times, baseline, strict=True))
    p20, p50, p80 = (f"{1e3 * deciles[i]:.4g}" for i in (1, 4, 7))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "ratio": f"{ratio:.2f}"}


def environment(device: str) -> dict[str, str]:
    """The columns that say where and with what a row was measured."""
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    where = Path(__file__).parent
    try:
        return subprocess.check_output(command, cwd=where, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write rows that share their columns as CSV, making the folder where it is missing."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
