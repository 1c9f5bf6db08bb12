"""Cases of the suite conv on a GPU: the end of a residual block with the beginning of the next."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import compiled, without_gradients
from emanet_triton.bench.suites import conv_case
from emanet_triton.bench.walk import OperatorCall
from emanet_triton.kernels.conv.op import expand_reduce, pack_weight, why_not_one_kernel
from emanet_triton.kernels.device import DTYPE_NAMES

PROVIDERS = ("torch", "compiled", "separate", "triton")


@dataclass(frozen=True)
class Pair:
    """Two 1x1 convolutions, of which the first expands and the second reduces the channels.

    Attributes:
        batch, channels, height, width: of the input.
        outputs: channels of the first convolution's output.
        reduced: channels of the second convolution's output.
        dtype: of all tensors.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    reduced: int
    dtype: torch.dtype

    def __str__(self) -> str:
        channels = f"P={self.channels} O={self.outputs} R={self.reduced}"
        size = f"H={self.height} W={self.width} B={self.batch}"
        return f"expand-reduce {channels} {size} {DTYPE_NAMES[self.dtype]}"

    @classmethod
    def of(cls, call: OperatorCall) -> "Pair":
        """What a call of ``expand_reduce`` computes."""
        outputs, reduced = (weight.shape[0] for weight in call["weights"])
        batch, channels, height, width = call["x"].shape
        return cls(batch, channels, height, width, outputs, reduced, call["x"].dtype)

    @property
    def has_kernel(self) -> bool:
        """Whether one kernel can compute both convolutions."""
        return not why_not_one_kernel(self.dtype, self.channels, self.outputs, self.reduced)

    def floor(self) -> Cost:
        """Every tensor moved once, every product computed once."""
        pixels = self.batch * self.height * self.width
        weights = self.outputs * (self.channels + self.reduced)
        tensors = self.channels + 2 * self.outputs + self.reduced  # the residual is one of them
        numbers = pixels * tensors + weights + self.outputs + self.reduced
        return Cost(self.dtype.itemsize * numbers, 2 * pixels * weights)


def pairs(calls: Counter[OperatorCall]) -> Counter[Pair]:
    """The pairs of a network that one kernel can compute, and how many of each there are."""
    found: Counter[Pair] = Counter()
    for call, count in calls.items():
        if call.name == "expand_reduce" and Pair.of(call).has_kernel:
            found[Pair.of(call)] += count
    return found


def make_case(selection: Selection, pair: Pair, counts: str) -> Case:
    """The case of a pair. ``counts`` says how often each network uses the pair."""
    make = functools.partial(make_problem, pair, selection.device)
    name, dtype = f"{pair} {counts}", DTYPE_NAMES[pair.dtype]
    return conv_case.make_case(selection, name, make, PROVIDERS, provide, pair.floor(), dtype)


@dataclass(frozen=True)
class Problem:
    """The inputs of a pair, channels-last."""

    x: Tensor  # [B, P, H, W]
    weights: list[Tensor]  # [O, P, 1, 1], [R, O, 1, 1]
    biases: list[Tensor]  # [O], [R]
    residual: Tensor  # [B, O, H, W]

    def exact(self) -> tuple[Tensor, Tensor]:
        weights, biases = ([t.double() for t in ts] for ts in (self.weights, self.biases))
        return plain(self.x.double(), weights, biases, self.residual.double())


def make_problem(pair: Pair, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(pair.dtype)

    def images(channels: int) -> Tensor:
        return pack_weight(normal(pair.batch, channels, pair.height, pair.width).relu_())

    sizes = (pair.outputs, pair.channels), (pair.reduced, pair.outputs)
    weights = [pack_weight(normal(o, c, 1, 1) / c**0.5) for o, c in sizes]
    biases = [normal(o) for o, _ in sizes]
    return Problem(images(pair.channels), weights, biases, images(pair.outputs))


def plain(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Both convolutions in ordinary PyTorch."""
    out = F.conv2d(x, weights[0], biases[0]).add_(residual).relu_()
    return out, F.conv2d(out, weights[1], biases[1]).relu_()


def provide(name: str, make: Callable[[], Problem]) -> Call:
    problem = make()
    arguments = problem.x, problem.weights, problem.biases, problem.residual
    if name in ("torch", "compiled"):
        return without_gradients(plain if name == "torch" else compiled(plain), *arguments)
    return without_gradients(expand_reduce, *arguments, backend=name)
