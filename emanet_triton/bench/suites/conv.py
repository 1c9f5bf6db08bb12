"""Each distinct convolution of R50 and R101, with bias, residual and ReLU."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.networks import BLOCKS, architecture, make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import compiled, without_gradients
from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.bench.suites import conv_bottleneck
from emanet_triton.bench.suites.conv_error import MOST_ERROR, relative_error
from emanet_triton.kernels import winograd
from emanet_triton.kernels.conv import conv_bias_act, pack_weight
from emanet_triton.kernels.conv_cost import ConvShape
from emanet_triton.kernels.conv_cpu import conv_bias_act_, has_onednn
from emanet_triton.kernels.cost import Cost
from emanet_triton.models.emanet import EMANet

QUICK_LAYERS = 6  # of a short run on a CPU


@dataclass(frozen=True)
class Layer:
    """One convolution; height and width are its input's."""

    kernel: int
    channels: int
    outputs: int
    height: int
    width: int
    stride: int
    dilation: int
    residual: bool
    relu: bool

    def __str__(self) -> str:
        after = f"{' residual' if self.residual else ''}{' relu' if self.relu else ''}"
        return (
            f"{self.kernel}x{self.kernel} C={self.channels} O={self.outputs} H={self.height} "
            f"W={self.width} stride={self.stride} dilation={self.dilation}{after}"
        )

    def shape(self, batch: int, dtype: torch.dtype) -> ConvShape:
        return ConvShape(
            *(batch, self.channels, self.height, self.width),
            *(self.outputs, self.kernel, self.stride, self.dilation),
            *(dtype, dtype if self.residual else None, dtype, self.relu),
        )


@functools.cache
@torch.no_grad()
def layers(network: str, size: Size, tiny: bool = False) -> Counter[Layer]:
    """The convolutions that a network runs on an image, and how often; the EM block's aside.

    Found by running it on a device that computes nothing.
    """
    found: Counter[Layer] = Counter()
    with torch.device("meta"):
        model = EMANet(architecture(network, tiny), make_protocol("whole", size)).eval()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(functools.partial(_record, found, name))
        model(torch.empty(1, 3, *size))
    return found


def _record(found: Counter, name: str, conv: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
    (x,) = inputs
    layer = Layer(
        *(conv.kernel_size[0], conv.in_channels, conv.out_channels, *x.shape[2:]),
        *(conv.stride[0], conv.dilation[0]),
        residual=name.endswith(".conv3"),
        relu=".downsample." not in name and not name.endswith("conv_seg"),
    )
    found[layer] += 1


def cases(selection: Selection) -> Iterator[Case]:
    """Every convolution of the networks, on a GPU whole bottlenecks too, and each dtype."""
    dtypes, sizes = _defaults(selection)
    for dtype, size, batch in itertools.product(
        selection.dtypes or dtypes, selection.sizes or sizes, selection.batches or [1]
    ):
        uses = {network: layers(network, size, selection.tiny) for network in BLOCKS}
        wanted = [uses[network] for network in selection.networks or BLOCKS]
        if selection.quick and not selection.cuda:
            wanted = [_heaviest(uses["r50"], QUICK_LAYERS)]
        for layer in dict.fromkeys(itertools.chain.from_iterable(wanted)):
            counts = " ".join(f"{network}={uses[network][layer]}" for network in BLOCKS)
            yield _case(selection, layer, batch, dtype, counts)
        if selection.cuda and not selection.tiny and dtype != "fp32":
            yield from conv_bottleneck.cases(selection, size, batch, dtype)


def _heaviest(uses: Counter[Layer], count: int) -> list[Layer]:
    """The layers that make up most of a network's FLOPs."""
    flops = {layer: n * layer.shape(1, torch.float32).flops for layer, n in uses.items()}
    return sorted(flops, key=flops.__getitem__, reverse=True)[:count]


def _defaults(selection: Selection) -> tuple[list[str], list[Size]]:
    """Dtypes and sizes of images."""
    if selection.tiny:
        return ["fp32"], [(24, 40)]
    if selection.cuda:
        return (["bf16"] if selection.quick else ["bf16", "fp32"]), [(1024, 2048)]
    return (["fp32"], [(128, 256)]) if selection.quick else (["fp32", "bf16"], [(512, 1024)])


@dataclass(frozen=True)
class Problem:
    """The inputs of one convolution, in NCHW memory."""

    layer: Layer
    x: Tensor  # [B, C, H, W]
    weight: Tensor  # [O, C, k, k]
    bias: Tensor  # [O]
    residual: Tensor | None  # [B, O, H / stride, W / stride]

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.layer.stride, "dilation": self.layer.dilation}

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        """What PyTorch's users write."""
        padding = self.layer.dilation * (self.layer.kernel // 2)
        out = F.conv2d(x, weight, bias, padding=padding, **self.geometry)
        out = out if residual is None else out.add_(residual)
        return out.relu_() if self.layer.relu else out

    def exact(self) -> Tensor:
        """In float64."""
        arguments = self.x, self.weight, self.bias, self.residual
        return self.plain(*(None if t is None else t.double() for t in arguments))


def make_problem(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> Problem:
    """An input as after a ReLU; weights that keep its size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, outputs, kernel = layer.channels, layer.outputs, layer.kernel
    x = normal(batch, channels, layer.height, layer.width).relu_()
    weight = normal(outputs, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5
    out = [(side - 1) // layer.stride + 1 for side in (layer.height, layer.width)]
    residual = normal(batch, outputs, *out).relu_() if layer.residual else None
    tensors = x, weight, normal(outputs), residual
    return Problem(layer, *(None if t is None else t.to(device, dtype) for t in tensors))


def _case(selection: Selection, layer: Layer, batch: int, dtype: str, counts: str) -> Case:
    make = functools.partial(make_problem, layer, batch, DTYPES[dtype], selection.device)
    problem = functools.cache(make)
    exact = functools.cache(lambda: problem().exact())
    shape = layer.shape(batch, DTYPES[dtype])
    names = _providers(selection, layer, DTYPES[dtype])
    return Case(
        suite="conv",
        name=f"{layer} B={batch} {dtype} {counts}",
        providers=selection.pick(
            {name: functools.partial(provide, name, problem) for name in names},
            "torch",
            ("compiled",) if selection.short else (),
        ),
        baseline="torch",
        error=lambda got: relative_error(got, exact()),
        bound=MOST_ERROR[dtype],
        prepare=problem,
        floor=Cost(shape.bytes, shape.flops),
        dtype=dtype,
        graph=True,
    )


def _providers(selection: Selection, layer: Layer, dtype: torch.dtype) -> list[str]:
    if selection.cuda:
        return ["torch", "compiled", "cudnn", "triton"]
    names = ["torch", "compiled"]
    if has_onednn(dtype):
        names.append("onednn")
    return [*names, "winograd"] if layer.kernel == 3 and layer.stride == 1 else names


def provide(name: str, make: Callable[[], Problem]) -> Call:
    """A call that runs one provider; beside the baseline on the CPU all are channels-last."""
    problem = make()
    relu = problem.layer.relu
    if name == "torch" and not problem.x.is_cuda:
        arguments = problem.x, problem.weight, problem.bias, problem.residual
        return without_gradients(problem.plain, *arguments)
    x = problem.x.contiguous(memory_format=torch.channels_last)
    residual = problem.residual
    if residual is not None:
        residual = residual.clone(memory_format=torch.channels_last)  # oneDNN overwrites it
    if name == "winograd":
        weight = winograd.pack_weight(problem.weight)
        options = {"dilation": problem.layer.dilation, "relu": relu}
        return without_gradients(
            winograd.winograd_conv, x, weight, problem.bias, residual, **options
        )
    arguments = x, pack_weight(problem.weight), problem.bias, residual
    if name == "onednn":
        return without_gradients(conv_bias_act_, *arguments, **problem.geometry, relu=relu)
    if name in ("torch", "compiled"):
        function = problem.plain if name == "torch" else compiled(problem.plain)
        return without_gradients(function, *arguments)
    options = problem.geometry | {"relu": relu, "provider": name}
    return without_gradients(conv_bias_act, *arguments, **options)


def summary(rows: Sequence[Row]) -> str:
    """Who is the fastest at each convolution and how far from the floor, the worst first."""
    ordered = sorted(_fastest(rows), key=lambda row: -(row.x_floor or 0))
    columns = ["fastest", "ms", "floor, ms", "x floor", "convolution and its uses"]
    lines = [
        [row.provider, f"{row.p50_ms:.4g}", f"{row.floor_ms:.4g}", f"{row.x_floor:.2f}", row.case]
        for row in ordered
    ]
    return tabulate(lines, columns, disable_numparse=True) + "\n" + totals(rows)


def _fastest(rows: Sequence[Row]) -> list[Row]:
    """The fastest provider's row of each case."""
    found: dict[str, Row] = {}
    for row in rows:
        best = found.get(row.case)
        if row.gate == PASSED and (best is None or row.p50_ms < best.p50_ms):
            found[row.case] = row
    return list(found.values())


def totals(rows: Sequence[Row]) -> str:
    """All of these in each network: by the baseline, by the fastest of each, their floor."""
    winners = _fastest(rows)
    plain = {row.case: row.p50_ms for row in rows if row.provider == "torch" and row.p50_ms}
    lines = []
    for dtype, network in itertools.product(dict.fromkeys(r.dtype for r in winners), BLOCKS):
        uses = [
            (int(re.search(rf"\b{network}=(\d+)", row.case)[1]), row)
            for row in winners
            if row.dtype == dtype and row.case in plain and "bottleneck" not in row.case
        ]
        torch_ms = sum(count * plain[row.case] for count, row in uses)
        best_ms = sum(count * row.p50_ms for count, row in uses)
        floor_ms = sum(count * row.floor_ms for count, row in uses)
        if uses:
            lines.append(
                f"these in {network}, {dtype}: torch {torch_ms:.4g} ms, the fastest of each "
                f"{best_ms:.4g} ms, floor {floor_ms:.4g} ms"
            )
    return "\n".join(lines)
