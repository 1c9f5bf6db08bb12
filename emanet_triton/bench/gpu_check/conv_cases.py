"""Cases of correctness of the convolutions, each a recorded call of an operator."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.gpu_check.cases import Run
from emanet_triton.bench.gpu_check.compared import Compared, close, poisoned
from emanet_triton.bench.suites.conv_layers import layers
from emanet_triton.bench.walk import OperatorCall, TensorSpec
from emanet_triton.kernels.conv.op import bottleneck, conv_bias_act
from emanet_triton.kernels.device import DTYPE_NAMES


@dataclass(frozen=True)
class ConvCase:
    """A convolution by the backend of its call."""

    call: OperatorCall

    @property
    def name(self) -> str:
        (layer,) = layers(Counter([self.call]))
        precision = f" {self.call['precision']}" if self.call["x"].dtype == torch.float32 else ""
        return f"{layer}{precision} {self.call['backend']}"

    def calls(self) -> list[OperatorCall]:
        return [self.call]

    def runner(self, device: str) -> Run:
        return self._runner(self.inputs(device), self.call["backend"])

    def compare(self, device: str) -> list[Compared]:
        arguments = self.inputs(device)
        (got,) = poisoned(self._runner(arguments, self.call["backend"]), device)
        (plain,) = self._runner(arguments, "torch")()
        want = torch.cat([self._exact(*arguments, image) for image in range(len(got))])
        return [close("out", got, want, plain, arguments[0].dtype, self.call["precision"])]

    def inputs(self, device: str) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, *_ = self.call.values(device)
        _fill([x, residual], [weight], [bias])
        return x, weight, bias, residual

    def _runner(self, arguments: tuple[Tensor | None, ...], backend: str) -> Run:
        names = "stride", "dilation", "relu", "out_dtype", "precision"
        options = {name: self.call[name] for name in names}
        return lambda: (conv_bias_act(*arguments, **options, backend=backend),)

    def _exact(self, x, weight, bias, residual, image: int) -> Tensor:
        """An image in float64."""
        dilation = self.call["dilation"]
        geometry = self.call["stride"], dilation * (weight.shape[2] // 2), dilation
        out = F.conv2d(x[image, None].double(), weight.double(), bias.double(), *geometry)
        out = out if residual is None else out + residual[image, None].double()
        return out.relu() if self.call["relu"] else out


@dataclass(frozen=True)
class BottleneckCase:
    """A residual block by the backend of its call."""

    call: OperatorCall

    @property
    def name(self) -> str:
        x, planes = self.call["x"], self.call["weights"][1].shape[0]
        batch, channels, height, width = x.shape
        sizes = f"C={channels} P={planes} H={height} W={width}"
        projected = " projected" if self.call["residual"].shape != x.shape else ""
        dtype = DTYPE_NAMES[x.dtype]
        return f"bottleneck {sizes}{projected} B={batch} {dtype} {self.call['backend']}"

    def calls(self) -> list[OperatorCall]:
        return [self.call]

    def runner(self, device: str) -> Run:
        return self._runner(*self.inputs(device))

    def compare(self, device: str) -> list[Compared]:
        x, weights, biases, residual = inputs = self.inputs(device)
        (got,) = poisoned(self._runner(*inputs), device)
        exact = [
            _in_three(*_doubled(x[i, None], weights, biases, residual[i, None]))
            for i in range(len(x))
        ]
        return [close("out", got, torch.cat(exact), _in_three(*inputs), x.dtype)]

    def inputs(self, device: str) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        x, weights, biases, residual, *_ = self.call.values(device)
        _fill([x, residual], weights, biases)
        return x, weights, biases, residual

    def _runner(self, *arguments: Tensor | list[Tensor]) -> Run:
        options = {"backend": self.call["backend"], "precision": self.call["precision"]}
        return lambda: (bottleneck(*arguments, **options),)


def with_dtype(call: OperatorCall, dtype: torch.dtype) -> OperatorCall:
    """A call whose tensors of half precision are of another."""
    half = torch.bfloat16, torch.float16

    def changed(value: object) -> object:
        if isinstance(value, TensorSpec) and value.dtype in half:
            return dataclasses.replace(value, dtype=dtype)
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return dtype if value in half else value

    return call.but(**{name: changed(value) for name, value in call.arguments})


def _fill(images: list[Tensor | None], weights: list[Tensor], vectors: list[Tensor]) -> None:
    """Values as in a network: images as after a ReLU, weights that keep their size."""
    tensors = [t for t in (*images, *weights, *vectors) if t is not None]
    generator = torch.Generator(tensors[0].device).manual_seed(0)
    for tensor in tensors:
        tensor.normal_(generator=generator)
    for weight in weights:
        weight.mul_(weight[0].numel() ** -0.5)
    for image in filter(lambda image: image is not None, images):
        image.relu_()


def _in_three(x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor) -> Tensor:
    """A residual block as PyTorch's users write it."""
    out = F.conv2d(x, weights[0], biases[0].to(x.dtype)).relu_()
    out = F.conv2d(out, weights[1], biases[1].to(x.dtype), padding=1).relu_()
    return F.conv2d(out, weights[2], biases[2].to(x.dtype)).add_(residual).relu_()


def _doubled(*arguments: Tensor | list[Tensor]) -> list:
    return [[t.double() for t in a] if isinstance(a, list) else a.double() for a in arguments]
