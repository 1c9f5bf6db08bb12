"""Each distinct convolution of the fused R50 and R101, with bias, residual and ReLU."""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.bench import runtimes
from emanet_triton.bench.case import Absent, Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import NETWORKS
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import compiled, without_gradients
from emanet_triton.bench.suite import Suite
from emanet_triton.bench.suites import conv_case, conv_expand_reduce
from emanet_triton.bench.suites.conv_layers import Layer, layers, walks
from emanet_triton.bench.suites.conv_sums import summary
from emanet_triton.inference.views import Size
from emanet_triton.kernels.conv import winograd
from emanet_triton.kernels.conv.onednn import conv_bias_act_
from emanet_triton.kernels.conv.op import conv_bias_act, pack_weight
from emanet_triton.kernels.device import DTYPE_NAMES, gluon_arch, has_onednn

QUICK_LAYERS = 6  # of a short run on a CPU
RUNTIMES = {  # on a CPU
    torch.float32: ("openvino-fp32", "onnxruntime-fp32"),
    torch.bfloat16: ("openvino-bf16",),
}


def cases(selection: Selection) -> Iterator[Case]:
    """Every convolution of the networks in each dtype; on a GPU pairs of them, too."""
    dtypes, sizes = _defaults(selection)
    for dtype, size, batch in itertools.product(
        selection.dtypes or dtypes, selection.sizes or sizes, selection.batches or [1]
    ):
        calls = walks(selection, size, batch, dtype)
        uses = {name: layers(own) for name, own in calls.items()}
        wanted: Iterator[Layer] | list[Layer] = _wanted(selection, uses)
        if selection.quick and not selection.cuda:
            wanted = _heaviest(uses["r50-whole"], QUICK_LAYERS)
        if selection.cuda and not selection.tiny and dtype != "fp32":
            pairs = {name: conv_expand_reduce.pairs(own) for name, own in calls.items()}
            for pair in _wanted(selection, pairs):
                yield conv_expand_reduce.make_case(selection, pair, counted(pairs, pair))
        for layer in wanted:
            yield _case(selection, layer, counted(uses, layer))


def counted(uses: Mapping[str, Counter[Any]], what: Hashable) -> str:
    """How often each network uses something, as a part of a case's name."""
    return " ".join(f"{name}={own[what]}" for name, own in uses.items() if own[what])


def _wanted(selection: Selection, uses: Mapping[str, Counter[Any]]) -> Iterator[Any]:
    """All that the selected networks use, each once."""
    wanted = selection.networks or NETWORKS
    own = [found for name, found in uses.items() if name.partition("-")[0] in wanted]
    return iter(dict.fromkeys(itertools.chain.from_iterable(own)))


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
        """The convolution in ordinary PyTorch."""
        shape = self.layer.shape
        padding = shape.dilation * (shape.kernel // 2)
        out = F.conv2d(x, weight, bias, padding=padding, **self.geometry)
        if residual is not None:
            out = out.add_(residual) if residual.dtype == out.dtype else out + residual
        out = out.relu_() if shape.relu else out
        return out.to(out_dtype or shape.out_dtype)

    def exact(self) -> Tensor:
        """The result in float64."""
        residual = None if self.residual is None else self.residual.double()
        arguments = self.x.double(), self.weight.double(), self.bias.double(), residual
        return self.plain(*arguments, out_dtype=torch.float64)

    def pitched_residual(self) -> Tensor | None:
        """A copy of the residual with the memory layout that it has in the network."""
        if self.residual is None:
            return None
        batch, outputs, *sides = self.residual.shape
        size = batch, self.layer.pitch, *sides
        whole = torch.empty(
            size, dtype=self.residual.dtype, device=self.x.device, memory_format=torch.channels_last
        )
        return whole[:, -outputs:].copy_(self.residual)


def make_problem(layer: Layer, device: str) -> Problem:
    """An input as after a ReLU, and weights that keep its size."""
    generator = torch.Generator(device).manual_seed(0)
    shape = layer.shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    x = normal(shape.batch, shape.channels, shape.height, shape.width).relu_()
    fan_in = shape.kernel**2 * shape.channels
    weight = normal(shape.outputs, shape.channels, shape.kernel, shape.kernel) / fan_in**0.5
    bias = normal(shape.outputs)
    x, weight, bias = (t.to(shape.dtype) for t in (x, weight, bias))
    residual = None
    if shape.residual:
        out = [(side - 1) // shape.stride + 1 for side in (shape.height, shape.width)]
        residual = normal(shape.batch, shape.outputs, *out).relu_().to(shape.residual)
    return Problem(layer, x, weight, bias, residual)


def _case(selection: Selection, layer: Layer, counts: str) -> Case:
    return conv_case.make_case(
        selection,
        f"{layer} {counts}",
        functools.partial(make_problem, layer, selection.device),
        names(selection, layer),
        provide,
        layer.floor(),
        DTYPE_NAMES[layer.shape.dtype],
    )


def names(selection: Selection, layer: Layer) -> list[str]:
    """The providers of a convolution."""
    shape = layer.shape
    if selection.cuda:
        ours = ["triton"] if shape.dtype != torch.float32 else ["triton", "triton-tf32x3"]
        ours += [] if layer.why_not_boxes("sm_90") else ["gluon"]
        return ["torch", "compiled", "cudnn", "cudnn-benchmark", *ours]
    found = ["torch", "compiled"]
    if has_onednn(shape.dtype) and layer.one_dtype:
        found.append("onednn")
    if shape.kernel == 3 and shape.stride == 1:
        found.append("winograd")
    return [*found, *RUNTIMES.get(shape.dtype, ())]


def provide(name: str, make: Callable[[], Problem]) -> Call:
    """A call that runs one provider. All but the baseline on the CPU run channels-last.

    Other runtimes have layouts of their own; they get NCHW, which is the faster for them.

    Raises:
        Absent: a kernel in Gluon cannot run on this device.
    """
    if name in runtimes.RUNTIMES:
        return _by_runtime(name, make)
    problem = make()
    shape = problem.layer.shape
    if name == "torch" and not problem.x.is_cuda:
        arguments = problem.x, problem.weight, problem.bias, problem.residual
        return without_gradients(problem.plain, *arguments)
    x = problem.x.contiguous(memory_format=torch.channels_last)
    residual = problem.pitched_residual()  # a copy, because oneDNN overwrites it
    options: dict[str, Any] = {"relu": shape.relu, "out_dtype": shape.out_dtype}
    if name == "winograd":
        weight = winograd.pack_weight(problem.weight)
        arguments = x, weight, problem.bias, residual
        options["dilation"] = shape.dilation
        return without_gradients(winograd.winograd_conv, *arguments, **options)
    arguments = x, pack_weight(problem.weight), problem.bias, residual
    if name == "onednn":
        return without_gradients(conv_bias_act_, *arguments, **problem.geometry, relu=shape.relu)
    if name in ("torch", "compiled"):
        function = problem.plain if name == "torch" else compiled(problem.plain)
        return without_gradients(function, *arguments)
    if name == "gluon" and (why_not := problem.layer.why_not_boxes(gluon_arch(x))):
        raise Absent(f"it needs {why_not}")
    options |= problem.geometry | {"backend": name.removesuffix("-tf32x3")}
    options |= {"precision": "tf32x3"} if name == "triton-tf32x3" else {}
    return without_gradients(conv_bias_act, *arguments, **options)


class Convolution(nn.Module):
    """A problem's convolution in a form that can be exported, with the same weights in float32."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.weight = nn.Parameter(problem.weight.float(), requires_grad=False)
        self.bias = nn.Parameter(problem.bias.float(), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            residual = residual.float()
        return self.problem.plain(x.float(), self.weight, self.bias, residual)


def _by_runtime(name: str, make: Callable[[], Problem]) -> Call:
    compile_ = runtimes.RUNTIMES[name]("cpu")  # before anything is exported
    problem = make()
    inputs = [problem.x] if problem.residual is None else [problem.x, problem.residual]
    return without_gradients(compile_(Convolution(problem), *inputs), *inputs)


SUITE = Suite(
    name=conv_case.NAME,
    title="Each convolution",
    measures="every distinct convolution of the fused R50 and R101; on a GPU those of the sliding "
    "window too, and pairs of 1x1 convolutions",
    cases=cases,
    text="""\
This suite times each convolution of the fused network, with folded batch norm, bias, residual and
ReLU. `torch` is PyTorch's own convolution, `compiled` the same by `torch.compile`, `onednn`
oneDNN's fused convolution, `cudnn` cuDNN's, `cudnn-benchmark` cuDNN's after its search. `winograd`
and `triton` are ours. So is `gluon`, a kernel for Hopper GPUs, which a network with the backend
"auto" does not use. On a CPU, OpenVINO and ONNX Runtime run each convolution too, if they are
installed (`pip install '.[peers]'`). Before and after each convolution they copy the numbers to
their own memory layout and back, and these copies count. A whole network needs few such copies, so
these times are too long, most of all for 1x1 convolutions: compare the runtimes by the cases
`network` of the suite `model`.

The lines below a table sum up a network. *The fastest of each* is the fastest provider that our
network uses with the backend "auto"; `compiled`, `gluon` and the other runtimes are left out. The
list names the convolutions in which the network loses the most time above the floor. Winograd needs
fewer FLOP than the floor counts, so its time can be below the floor.

`r50-whole=3` says that R50 runs a convolution three times for one image; on a GPU the suite also
times the convolutions of the sliding window (`r50-slide`). `residual=fp32` and `out=fp32` name a
dtype that differs from the input's; `pitch=768` says that the residual is a part of a tensor of 768
channels.

`expand-reduce` is the last 1x1 convolution of a residual block, from P to O channels, and the first
1x1 convolution of the next block, from O to R channels. `separate` runs two convolutions, `triton`
one kernel. `bottleneck` is a whole residual block in one kernel. That kernel was slower than three
convolutions and was removed; its rows stay.""",
    summary=summary,
)
