"""Each distinct convolution of the fused R50 and R101, with bias, residual and ReLU."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.networks import BLOCKS
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import compiled, without_gradients
from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.bench.suites import conv_bottleneck
from emanet_triton.bench.suites.conv_error import bound, relative_error
from emanet_triton.bench.suites.conv_layers import Layer, layers, walks
from emanet_triton.kernels.conv import winograd
from emanet_triton.kernels.conv.onednn import conv_bias_act_, has_onednn
from emanet_triton.kernels.conv.op import conv_bias_act, pack_weight
from emanet_triton.kernels.device import DTYPE_NAMES

QUICK_LAYERS = 6  # of a short run on a CPU
USES = re.compile(r"\b(r\d+-\w+)=(\d+)")  # of a case by the networks, in its name

# Milliseconds of Triton's kernels. Forecast of a review of commit 54dbbc2, H100, nothing measured.
PREDICTED_MS = {
    "3x3 C=2048 O=768 H=128 W=256 stride=1 dilation=1 out=fp32 B=1 bf16": "1.8-1.95",
    "3x3 C=512 O=512 H=128 W=256 stride=1 dilation=2 relu B=1 bf16": "0.31-0.33",
    "3x3 C=512 O=512 H=128 W=256 stride=1 dilation=4 relu B=1 bf16": "0.31-0.33",
    "3x3 C=256 O=256 H=128 W=256 stride=1 dilation=1 relu B=1 bf16": "0.075-0.085",
    "3x3 C=256 O=256 H=128 W=256 stride=1 dilation=2 relu B=1 bf16": "0.075-0.085",
    "1x1 C=256 O=1024 H=128 W=256 stride=1 dilation=1 residual relu B=1 bf16": "0.065-0.075",
    "3x3 C=3 O=32 H=1024 W=2048 stride=2 dilation=1 relu B=1 bf16": "0.07-0.09",
}


def cases(selection: Selection) -> Iterator[Case]:
    """Every convolution of the networks, on a GPU whole bottlenecks too, in each dtype."""
    dtypes, sizes = _defaults(selection)
    for dtype, size, batch in itertools.product(
        selection.dtypes or dtypes, selection.sizes or sizes, selection.batches or [1]
    ):
        calls = walks(selection, size, batch, dtype)
        uses = {name: layers(own) for name, own in calls.items()}
        wanted = [own for name, own in uses.items() if _is_wanted(selection, name)]
        if selection.quick and not selection.cuda:
            wanted = [_heaviest(uses["r50-whole"], QUICK_LAYERS)]
        if selection.cuda and not selection.tiny and dtype != "fp32":
            blocks = {name: conv_bottleneck.blocks(own) for name, own in calls.items()}
            found = [own for name, own in blocks.items() if _is_wanted(selection, name)]
            for block in dict.fromkeys(itertools.chain.from_iterable(found)):
                yield conv_bottleneck.make_case(selection, block, counted(blocks, block))
        for layer in dict.fromkeys(itertools.chain.from_iterable(wanted)):
            yield _case(selection, layer, counted(uses, layer))


def counted(uses: dict[str, Counter], what: object) -> str:
    """How often each network uses something, for the names of cases."""
    return " ".join(f"{name}={own[what]}" for name, own in uses.items() if own[what])


def _is_wanted(selection: Selection, name: str) -> bool:
    return name.partition("-")[0] in (selection.networks or BLOCKS)


def _heaviest(uses: Counter[Layer], count: int) -> list[Layer]:
    """The layers that make up most of a network's FLOPs."""
    flops = {layer: n * layer.shape.flops for layer, n in uses.items()}
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
        return {"stride": self.layer.shape.stride, "dilation": self.layer.shape.dilation}

    def plain(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """What PyTorch's users write."""
        shape = self.layer.shape
        padding = shape.dilation * (shape.kernel // 2)
        out = F.conv2d(x, weight, bias, padding=padding, **self.geometry)
        if residual is not None:
            out = out.add_(residual) if residual.dtype == out.dtype else out + residual
        out = out.relu_() if shape.relu else out
        return out.to(out_dtype or shape.out_dtype)

    def exact(self) -> Tensor:
        """In float64."""
        arguments = self.x, self.weight, self.bias, self.residual
        doubled = (None if t is None else t.double() for t in arguments)
        return self.plain(*doubled, torch.float64)

    def pitched_residual(self) -> Tensor | None:
        """A copy of the residual in the memory that the network has it in."""
        if self.residual is None:
            return None
        batch, outputs, *sides = self.residual.shape
        size = batch, self.layer.pitch, *sides
        whole = torch.empty(
            size, dtype=self.residual.dtype, device=self.x.device, memory_format=torch.channels_last
        )
        return whole[:, -outputs:].copy_(self.residual)


def make_problem(layer: Layer, device: str) -> Problem:
    """An input as after a ReLU; weights that keep its size."""
    generator = torch.Generator(device).manual_seed(0)
    shape = layer.shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    x = normal(shape.batch, shape.channels, shape.height, shape.width).relu_()
    fan_in = shape.kernel**2 * shape.channels
    weight = normal(shape.outputs, shape.channels, shape.kernel, shape.kernel) / fan_in**0.5
    bias = normal(shape.outputs)
    tensors = (t.to(shape.dtype) for t in (x, weight, bias))
    residual = None
    if shape.residual:
        out = [(side - 1) // shape.stride + 1 for side in (shape.height, shape.width)]
        residual = normal(shape.batch, shape.outputs, *out).relu_().to(shape.residual)
    return Problem(layer, *tensors, residual)


def _case(selection: Selection, layer: Layer, counts: str) -> Case:
    problem = functools.cache(functools.partial(make_problem, layer, selection.device))
    exact = functools.cache(lambda: problem().exact())
    shape, dtype = layer.shape, DTYPE_NAMES[layer.shape.dtype]
    predicted = PREDICTED_MS.get(str(layer))
    return Case(
        suite="conv",
        name=f"{layer} {counts}",
        providers=selection.pick(
            {name: functools.partial(provide, name, problem) for name in names(selection, layer)},
            "torch",
            ("compiled",) if selection.short else (),
        ),
        baseline="torch",
        error=lambda got: relative_error(got, exact()),
        bound=functools.partial(bound, dtype),
        prepare=problem,
        floor=Cost(shape.bytes, shape.flops),
        dtype=dtype,
        predicted_ms={"triton": predicted} if predicted else {},
        graph=True,
    )


def names(selection: Selection, layer: Layer) -> list[str]:
    """The providers of a convolution."""
    shape = layer.shape
    if selection.cuda:
        ours = ["triton"] if shape.dtype != torch.float32 else ["triton", "triton-tf32x3"]
        return ["torch", "compiled", "cudnn", "cudnn-benchmark", *ours]
    found = ["torch", "compiled"]
    if has_onednn(shape.dtype) and layer.one_dtype:
        found.append("onednn")
    return [*found, "winograd"] if shape.kernel == 3 and shape.stride == 1 else found


def provide(name: str, make: Callable[[], Problem]) -> Call:
    """A call that runs one provider; beside the baseline on the CPU all are channels-last."""
    problem = make()
    shape = problem.layer.shape
    if name == "torch" and not problem.x.is_cuda:
        arguments = problem.x, problem.weight, problem.bias, problem.residual
        return without_gradients(problem.plain, *arguments)
    x = problem.x.contiguous(memory_format=torch.channels_last)
    residual = problem.pitched_residual()  # a copy: oneDNN overwrites it
    if name == "winograd":
        weight = winograd.pack_weight(problem.weight)
        options = {"dilation": shape.dilation, "relu": shape.relu, "out_dtype": shape.out_dtype}
        return without_gradients(
            winograd.winograd_conv, x, weight, problem.bias, residual, **options
        )
    arguments = x, pack_weight(problem.weight), problem.bias, residual
    if name == "onednn":
        return without_gradients(conv_bias_act_, *arguments, **problem.geometry, relu=shape.relu)
    if name in ("torch", "compiled"):
        function = problem.plain if name == "torch" else compiled(problem.plain)
        return without_gradients(function, *arguments)
    options = problem.geometry | {"relu": shape.relu, "out_dtype": shape.out_dtype}
    if name == "triton-tf32x3":
        options |= {"backend": "triton", "precision": "tf32x3"}
    else:
        options["backend"] = name
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
    plain = {row.case: row.p50_ms for row in rows if row.provider == "torch" and row.p50_ms}
    uses: dict[tuple[str, str], list[tuple[int, Row]]] = {}
    for row in _fastest(rows):
        if row.case in plain and "bottleneck" not in row.case:
            for network, count in USES.findall(row.case):
                uses.setdefault((row.dtype, network), []).append((int(count), row))
    lines = []
    for (dtype, network), own in uses.items():
        torch_ms = sum(count * plain[row.case] for count, row in own)
        best_ms = sum(count * row.p50_ms for count, row in own)
        floor_ms = sum(count * row.floor_ms for count, row in own)
        lines.append(
            f"{sum(count for count, _ in own)} convolutions of {network}, {dtype}: torch "
            f"{torch_ms:.4g} ms, the fastest of each {best_ms:.4g} ms, floor {floor_ms:.4g} ms"
        )
    return "\n".join(lines)
