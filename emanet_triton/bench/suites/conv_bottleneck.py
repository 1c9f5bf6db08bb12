"""Cases of the suite conv on a GPU: whole bottlenecks of layers 1 and 2, as one operator."""

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
from emanet_triton.kernels.conv.op import bottleneck, pack_weight
from emanet_triton.kernels.conv.tiles import BOTTLENECK_PLANES
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.models.resnet import Bottleneck

PROVIDERS = ("torch", "compiled", "separate", "triton")


@dataclass(frozen=True)
class Block:
    """A residual block of stride and dilation 1.

    Attributes:
        batch, channels, height, width: of the input.
        planes: channels of the 3x3 convolution.
        projected: whether the residual is another tensor than the input.
        dtype: of all tensors.
    """

    batch: int
    channels: int
    height: int
    width: int
    planes: int
    projected: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        identity = " projected" if self.projected else ""
        sizes = f"C={self.channels} P={self.planes} H={self.height} W={self.width}"
        return f"bottleneck {sizes}{identity} B={self.batch} {DTYPE_NAMES[self.dtype]}"

    @property
    def outputs(self) -> int:
        return Bottleneck.expansion * self.planes

    def floor(self) -> Cost:
        """Every tensor moved once, every product computed once."""
        pixels = self.batch * self.height * self.width
        weights = self.planes * (self.channels + 9 * self.planes + self.outputs)
        tensors = self.channels + self.outputs * (2 if self.projected else 1)
        biases = 2 * self.planes + self.outputs
        numbers = pixels * tensors + weights + biases
        return Cost(self.dtype.itemsize * numbers, 2 * pixels * weights)


def blocks(calls: Counter[OperatorCall]) -> Counter[Block]:
    """The blocks of a network that one kernel can run, and how many of each there are."""
    found: Counter[Block] = Counter()
    for call, count in calls.items():
        if call.name == "bottleneck":
            x, planes = call["x"], call["weights"][1].shape[0]
            if planes in BOTTLENECK_PLANES and x.dtype != torch.float32:
                projected = call["residual"].shape != x.shape
                batch, channels, height, width = x.shape
                sizes = batch, channels, height, width, planes
                found[Block(*sizes, projected, x.dtype)] += count
    return found


def make_case(selection: Selection, block: Block, counts: str) -> Case:
    """The case of a block. ``counts`` says how often each network uses the block."""
    make = functools.partial(make_problem, block, selection.device)
    name, dtype = f"{block} {counts}", DTYPE_NAMES[block.dtype]
    return conv_case.make_case(selection, name, make, PROVIDERS, provide, block.floor(), dtype)


@dataclass(frozen=True)
class Problem:
    """The inputs of a block, channels-last."""

    x: Tensor  # [B, C, H, W]
    weights: list[Tensor]  # [P, C, 1, 1], [P, P, 3, 3], [4 P, P, 1, 1]
    biases: list[Tensor]  # [P], [P], [4 P]
    identity: Tensor  # [B, 4 P, H, W]

    def exact(self) -> Tensor:
        weights, biases = ([t.double() for t in ts] for ts in (self.weights, self.biases))
        return plain(self.x.double(), weights, biases, self.identity.double())


def make_problem(block: Block, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(block.dtype)

    def images(channels: int) -> Tensor:
        return pack_weight(normal(block.batch, channels, block.height, block.width).relu_())

    x = images(block.channels)
    planes, outputs = block.planes, block.outputs
    sizes = (planes, block.channels, 1), (planes, planes, 3), (outputs, planes, 1)
    weights = [pack_weight(normal(o, c, k, k) / (k * k * c) ** 0.5) for o, c, k in sizes]
    biases = [normal(o) for o, _, _ in sizes]
    return Problem(x, weights, biases, images(outputs) if block.projected else x)


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor], identity: Tensor) -> Tensor:
    """The block in ordinary PyTorch."""
    out = F.conv2d(x, weights[0], biases[0]).relu_()
    out = F.conv2d(out, weights[1], biases[1], padding=1).relu_()
    return F.conv2d(out, weights[2], biases[2]).add_(identity).relu_()


def provide(name: str, make: Callable[[], Problem]) -> Call:
    problem = make()
    arguments = problem.x, problem.weights, problem.biases, problem.identity
    if name in ("torch", "compiled"):
        return without_gradients(plain if name == "torch" else compiled(plain), *arguments)
    return without_gradients(bottleneck, *arguments, backend=name)
