"""Cases of correctness for the convolutions: each is a recorded call of an operator."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emanet_triton.bench.cost import Cost
from emanet_triton.bench.gpu_check.cases import Run
from emanet_triton.bench.gpu_check.compared import Compared, close, poisoned
from emanet_triton.bench.gpu_check.tf32 import cut
from emanet_triton.bench.suites.conv import Problem
from emanet_triton.bench.suites.conv_expand_reduce import Pair, plain
from emanet_triton.bench.suites.conv_expand_reduce import Problem as PairProblem
from emanet_triton.bench.suites.conv_layers import Layer, layer_of
from emanet_triton.bench.walk import OperatorCall, TensorSpec
from emanet_triton.kernels.conv.op import conv_bias_act, expand_reduce


@dataclass(frozen=True)
class ConvCase:
    """A recorded convolution, by the backend that the call names."""

    call: OperatorCall

    @property
    def layer(self) -> Layer:
        return layer_of(self.call)

    @property
    def name(self) -> str:
        precision = f" {self.call['precision']}" if self.call["x"].dtype == torch.float32 else ""
        return f"{self.layer}{precision} {self.call['backend']}"

    def calls(self) -> list[OperatorCall]:
        return [self.call]

    def runner(self, device: str) -> Run:
        return self._runner(self.call["backend"], self.call["precision"], *self.inputs(device))

    def compare(self, device: str) -> list[Compared]:
        x, weight, bias, residual = self.inputs(device)
        (got,) = poisoned(self.runner(device), device)
        plain = self._plain(x, weight, bias, residual)
        images = zip(
            x.split(1), [None] * len(x) if residual is None else residual.split(1), strict=True
        )
        exact = [Problem(self.layer, image, weight, bias, added).exact() for image, added in images]
        return [close("out", got, torch.cat(exact), plain, x.dtype, self.call["precision"])]

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        """The output of plain PyTorch; its operands are cut off where the kernel's are."""
        precision = self.call["precision"]
        if x.dtype == torch.float32 and precision == "tf32":
            x, weight, precision = cut(x), cut(weight), "ieee"
        (out,) = self._runner("torch", precision, x, weight, bias, residual)()
        return out

    def floor(self) -> Cost:
        """The least bytes and FLOPs."""
        return self.layer.floor()

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Input, weight, bias and residual, with the same values at every call."""
        x, weight, bias, residual, *_ = self.call.values(device)
        _fill([x, residual], [weight], [bias])
        return x, weight, bias, residual

    def _runner(
        self,
        backend: str,
        precision: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
    ) -> Run:
        options = {name: self.call[name] for name in ("stride", "dilation", "relu", "out_dtype")}
        options |= {"backend": backend, "precision": precision}
        return lambda: (conv_bias_act(x, weight, bias, residual, **options),)


@dataclass(frozen=True)
class ExpandReduceCase:
    """A recorded pair of 1x1 convolutions, by the backend that the call names."""

    call: OperatorCall

    @property
    def layer(self) -> Pair:
        return Pair.of(self.call)

    @property
    def name(self) -> str:
        return f"{self.layer} {self.call['backend']}"

    def calls(self) -> list[OperatorCall]:
        return [self.call]

    def runner(self, device: str) -> Run:
        return self._runner(*self.inputs(device))

    def compare(self, device: str) -> list[Compared]:
        x, weights, biases, residual = inputs = self.inputs(device)
        got = poisoned(self._runner(*inputs), device)
        images = zip(x.split(1), residual.split(1), strict=True)
        exact = [PairProblem(image, weights, biases, added).exact() for image, added in images]
        outputs = zip(
            ("out", "reduced"), got, zip(*exact, strict=True), plain(*inputs), strict=True
        )
        return [
            close(name, found, torch.cat(wanted), by_torch, x.dtype)
            for name, found, wanted, by_torch in outputs
        ]

    def floor(self) -> Cost:
        """The least bytes and FLOPs."""
        return self.layer.floor()

    def inputs(self, device: str) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Input, weights, biases and residual, with the same values at every call."""
        x, weights, biases, residual, *_ = self.call.values(device)
        _fill([x, residual], weights, biases)
        return x, weights, biases, residual

    def _runner(
        self, x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor
    ) -> Run:
        options = {"backend": self.call["backend"], "precision": self.call["precision"]}
        return lambda: expand_reduce(x, weights, biases, residual, **options)


def case_of(call: OperatorCall) -> ConvCase | ExpandReduceCase:
    """The case of a recorded convolution or pair of convolutions."""
    return ExpandReduceCase(call) if call.name == "expand_reduce" else ConvCase(call)


def with_dtype(call: OperatorCall, dtype: torch.dtype) -> OperatorCall:
    """The same call in another dtype of half precision."""
    half = torch.bfloat16, torch.float16

    def changed(value: object) -> object:
        if isinstance(value, TensorSpec) and value.dtype in half:
            return dataclasses.replace(value, dtype=dtype)
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        return dtype if value in half else value

    return call.but(**{name: changed(value) for name, value in call.arguments})


def _fill(
    images: Sequence[Tensor | None], weights: Sequence[Tensor], vectors: Sequence[Tensor]
) -> None:
    """Fill tensors as in a network: images as after a ReLU, weights that keep their size."""
    given = [image for image in images if image is not None]
    generator = torch.Generator(given[0].device).manual_seed(0)
    for tensor in (*given, *weights, *vectors):
        tensor.normal_(generator=generator)
    for weight in weights:
        weight.mul_(weight[0].numel() ** -0.5)
    for image in given:
        image.relu_()
