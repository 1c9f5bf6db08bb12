"""Cases of the suite conv on a GPU: whole bottlenecks of layers 1 and 2, as one operator."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.networks import BLOCKS, architecture, make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import compiled, without_gradients
from emanet_triton.bench.suites.conv_error import MOST_ERROR, relative_error
from emanet_triton.kernels.conv import bottleneck, pack_weight
from emanet_triton.kernels.conv_tiles import BOTTLENECK_PLANES
from emanet_triton.kernels.cost import Cost
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.resnet import Bottleneck

PROVIDERS = ("torch", "compiled", "separate", "triton")


@dataclass(frozen=True)
class Block:
    """A residual block of stride and dilation 1; without ``projected`` its input is its identity.

    Attributes:
        channels: of the input.
        planes: of the 3x3 convolution.
        height, width: of input and output.
        projected: whether the identity is another tensor than the input.
    """

    channels: int
    planes: int
    height: int
    width: int
    projected: bool

    def __str__(self) -> str:
        identity = " projected" if self.projected else ""
        return (
            f"bottleneck C={self.channels} P={self.planes} H={self.height} W={self.width}{identity}"
        )

    @property
    def outputs(self) -> int:
        return Bottleneck.expansion * self.planes

    def floor(self, batch: int, itemsize: int) -> Cost:
        """Every tensor moved once, every product computed once."""
        pixels = batch * self.height * self.width
        weights = self.planes * (self.channels + 9 * self.planes + self.outputs)
        tensors = self.channels + self.outputs * (2 if self.projected else 1)
        biases = 2 * self.planes + self.outputs
        return Cost(itemsize * (pixels * tensors + weights + biases), 2 * pixels * weights)


@functools.cache
@torch.no_grad()
def blocks(network: str, size: Size) -> Counter[Block]:
    """The blocks of a network that the operator can run on an image of this size, and how many."""
    found: Counter[Block] = Counter()

    def record(module: Bottleneck, inputs: tuple[Tensor], _: Tensor) -> None:
        middle = module.conv2
        if middle.stride == middle.dilation == (1, 1) and middle.out_channels in BOTTLENECK_PLANES:
            _, channels, *sides = inputs[0].shape
            found[Block(channels, middle.out_channels, *sides, module.downsample is not None)] += 1

    with torch.device("meta"):
        model = EMANet(architecture(network), make_protocol("whole", size)).eval()
        for module in model.modules():
            if isinstance(module, Bottleneck):
                module.register_forward_hook(record)
        model(torch.empty(1, 3, *size))
    return found


def cases(selection: Selection, size: Size, batch: int, dtype: str) -> Iterator[Case]:
    """Every distinct block of the networks."""
    uses = {network: blocks(network, size) for network in BLOCKS}
    wanted = [block for network in selection.networks or BLOCKS for block in uses[network]]
    for block in dict.fromkeys(wanted):
        counts = " ".join(f"{network}={uses[network][block]}" for network in BLOCKS)
        yield make_case(selection, block, batch, dtype, counts)


def make_case(selection: Selection, block: Block, batch: int, dtype: str, counts: str) -> Case:
    kind = DTYPES[dtype]
    problem = functools.cache(functools.partial(make_problem, block, batch, kind, selection.device))
    exact = functools.cache(lambda: problem().exact())
    return Case(
        suite="conv",
        name=f"{block} B={batch} {dtype} {counts}",
        providers=selection.pick(
            {name: functools.partial(provide, name, problem) for name in PROVIDERS},
            "torch",
            ("compiled",) if selection.short else (),
        ),
        baseline="torch",
        error=lambda got: relative_error(got, exact()),
        bound=MOST_ERROR[dtype],
        prepare=problem,
        floor=block.floor(batch, kind.itemsize),
        dtype=dtype,
        graph=True,
    )


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


def make_problem(block: Block, batch: int, dtype: torch.dtype, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def images(channels: int) -> Tensor:
        return pack_weight(normal(batch, channels, block.height, block.width).relu_())

    x = images(block.channels)
    sizes = (block.planes, block.channels, 1), (block.planes, block.planes, 3)
    sizes = *sizes, (block.outputs, block.planes, 1)
    weights = [pack_weight(normal(o, c, k, k) / (k * k * c) ** 0.5) for o, c, k in sizes]
    biases = [normal(o) for o, _, _ in sizes]
    return Problem(x, weights, biases, images(block.outputs) if block.projected else x)


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor], identity: Tensor) -> Tensor:
    """What PyTorch's users write."""
    out = F.conv2d(x, weights[0], biases[0]).relu_()
    out = F.conv2d(out, weights[1], biases[1], padding=1).relu_()
    return F.conv2d(out, weights[2], biases[2]).add_(identity).relu_()


def provide(name: str, make: Callable[[], Problem]) -> Call:
    problem = make()
    arguments = problem.x, problem.weights, problem.biases, problem.identity
    if name in ("torch", "compiled"):
        return without_gradients(plain if name == "torch" else compiled(plain), *arguments)
    return without_gradients(bottleneck, *arguments, provider=name)
