"""Cases of correctness: an operator's result against float64 and plain PyTorch."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from emanet_triton.bench.cost import Cost, Shape
from emanet_triton.bench.gpu_check.compared import Compared, close, equal, poisoned
from emanet_triton.bench.gpu_check.tf32 import CutOperands
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.suites import em, post
from emanet_triton.bench.walk import OperatorCall, recorded
from emanet_triton.inference.views import Size
from emanet_triton.kernels.device import DTYPE_NAMES, DTYPES
from emanet_triton.kernels.em import op as ops
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.kernels.resample.op import IGNORE, confusion_counts, resample_probabilities

Run = Callable[[], tuple[Tensor, ...]]  # returns the outputs


class Case(Protocol):
    """One problem. It can be pickled."""

    @property
    def name(self) -> str: ...

    def calls(self) -> list[OperatorCall]:
        """The calls of operators that it makes, on the meta device."""

    def runner(self, device: str) -> Run:
        """A function that runs the operator on inputs on a device."""

    def compare(self, device: str) -> list[Compared]:
        """Run the operator on a device, and compare each output with the exact one."""


@dataclass(frozen=True)
class EmCase:
    """EM attention, or its block.

    Attributes:
        operation: "attention" or "block".
        batch, size, channels, bases: B, (H, W) and C of the features [B, C, H, W], and K.
        dtype: "bf16", "fp16" or "fp32".
        precision: how products of float32 are computed.
        layout: "channels-last" or "nchw".
        backend: of the operator, one by Triton.
    """

    operation: str
    batch: int
    size: Size
    channels: int = 512
    bases: int = 64
    dtype: str = "bf16"
    precision: str = "ieee"
    layout: str = "channels-last"
    backend: str = "triton"

    @property
    def name(self) -> str:
        height, width = self.size
        precision = f" {self.precision}" if self.dtype == "fp32" else ""
        sizes = f"B={self.batch} C={self.channels} K={self.bases} H={height} W={width}"
        backend = "" if self.backend == "triton" else f" {self.backend}"
        return f"{self.operation} {sizes} {self.dtype}{precision} {self.layout}{backend}"

    def calls(self) -> list[OperatorCall]:
        options: dict[str, Any] = {"dtype": DTYPES[self.dtype], "device": "meta"}
        shape = self.batch, self.channels, *self.size
        feats = torch.empty(shape, memory_format=em.LAYOUTS[self.layout], **options)
        weight = torch.empty(self.channels, self.channels, **options)
        bases = torch.empty(1, self.channels, self.bases, **options)
        vector = torch.empty(self.channels, **options)
        return recorded(lambda: self._run(feats, bases, weight, vector, weight, vector))

    def _run(self, feats: Tensor, bases: Tensor, *weights: Any) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"backend": self.backend, "precision": self.precision}
        if self.operation == "attention":
            return ops.em_attention(feats, bases, **options)
        return ops.em_attention_block(feats, bases, *weights, **options)

    def runner(self, device: str) -> Run:
        arguments = self._problem(device).block_arguments()
        return lambda: self._run(*arguments)

    def inputs(self, device: str) -> tuple[Any, ...]:
        """The arguments of the block's launcher, with the same values at every call."""
        assert self.operation == "block"
        feats, *others = self._problem(device).block_arguments()
        (call,) = self.calls()
        given = (call[name] for name in ("num_stages", "norm_shift", "out_relu", "precision"))
        return ops.as_positions(feats), *others, *given

    def floor(self) -> Cost:
        """The least bytes and FLOPs."""
        positions = self.size[0] * self.size[1]
        shape = Shape(self.batch, positions, self.channels, self.bases, dtype=self.dtype)
        return em.FLOORS[self.operation](shape)

    def _problem(self, device: str) -> em.Problem:
        return em.make_problem(
            *(self.batch, self.size, self.channels, self.bases),
            dtype=DTYPES[self.dtype],
            device=device,
            memory_format=em.LAYOUTS[self.layout],
        )

    def compare(self, device: str) -> list[Compared]:
        problem = self._problem(device)
        arguments = problem.block_arguments()
        got = poisoned(lambda: self._run(*arguments), device)
        plain = self._plain(problem)
        compared = []
        for image in sorted({0, self.batch - 1}):
            want = em.float64(self.operation, problem, image)
            for output, g, p, w in zip(("out", "bases"), got, plain, want, strict=True):
                mine, theirs = (t[image].reshape(w[0].shape) for t in (g, p))
                name = f"{output} of image {image}"
                dtype = DTYPES[self.dtype]
                compared.append(close(name, mine, w[0], theirs, dtype, self.precision))
        return compared

    def _plain(self, problem: em.Problem) -> tuple[Tensor, Tensor]:
        cuts = (self.dtype, self.precision) == ("fp32", "tf32")
        operands = CutOperands() if cuts else contextlib.nullcontext()
        with torch.no_grad(), cuda_fp32("ieee"), operands:
            if self.operation == "attention":
                return em.mmseg_attention(problem.feats, problem.bases)
            return em.mmseg_block(problem)


@dataclass(frozen=True)
class PoolCase:
    """A recorded pooling, by Triton. It has the values of PyTorch's, to the last bit."""

    call: OperatorCall

    @property
    def name(self) -> str:
        x = self.call["x"]
        batch, channels, height, width = x.shape
        return f"pool C={channels} H={height} W={width} B={batch} {DTYPE_NAMES[x.dtype]}"

    def calls(self) -> list[OperatorCall]:
        return [self.call]

    def runner(self, device: str) -> Run:
        image = self._image(device)
        return lambda: (max_pool(image, backend="triton"),)

    def compare(self, device: str) -> list[Compared]:
        (got,) = poisoned(self.runner(device), device)
        return [equal("out", got, max_pool(self._image(device), backend="torch"))]

    def _image(self, device: str) -> Tensor:
        """Noise with the same values at every call."""
        image = self.call.values(device)[0]
        return image.normal_(generator=torch.Generator(device).manual_seed(0))


@dataclass(frozen=True)
class LabelsCase:
    """Labels, or probabilities too, of one image of (height, width)."""

    mode: str
    ms_flip: bool
    size: Size
    dtype: str
    probabilities: bool = False
    tiny: bool = False

    @property
    def name(self) -> str:
        what = "probabilities" if self.probabilities else "labels"
        views = " ms+flip" if self.ms_flip else ""
        return f"{what} {self.mode}{views} {self.size[0]}x{self.size[1]} {self.dtype}"

    def calls(self) -> list[OperatorCall]:
        return recorded(lambda: self._run(self._problem("meta")))

    def _problem(self, device: str) -> post.Problem:
        protocol = make_protocol(self.mode, self.size, self.tiny)
        return post.make_problem(protocol, self.ms_flip, self.size, DTYPES[self.dtype], device)

    def _run(self, problem: post.Problem) -> tuple[Tensor, ...]:
        if not self.probabilities:
            return (problem.taps("triton"),)
        return resample_probabilities(problem.packed, *problem.tables(), backend="triton")

    def runner(self, device: str) -> Run:
        problem = self._problem(device)
        return lambda: self._run(problem)

    @torch.inference_mode()
    def compare(self, device: str) -> list[Compared]:
        problem = self._problem(device)
        got = poisoned(lambda: self._run(problem), device)
        compared = [equal("labels", got[0], *post.clear_labels(problem))]
        if self.probabilities:
            want, plain = (problem.probabilities(t) for t in (torch.float64, torch.float32))
            compared.append(close("probabilities", got[1], want, plain, torch.float32))
        return compared


@dataclass(frozen=True)
class ConfusionCase:
    """Counts of the pairs of target and label in an image. Some targets and labels are no class."""

    size: Size
    classes: int

    @property
    def name(self) -> str:
        return f"confusion {self.size[0]}x{self.size[1]} classes={self.classes}"

    def calls(self) -> list[OperatorCall]:
        image = torch.empty(1, *self.size, dtype=torch.uint8, device="meta")
        return recorded(lambda: confusion_counts(image, image, self.classes, backend="triton"))

    def runner(self, device: str) -> Run:
        return self._runner(device, "triton")

    def compare(self, device: str) -> list[Compared]:
        (got,) = poisoned(self.runner(device), device)
        (want,) = self._runner("cpu", "torch")()
        return [equal("counts", got, want.to(device))]

    def _runner(self, device: str, backend: str) -> Run:
        generator = torch.Generator().manual_seed(0)
        targets, labels = (
            torch.randint(self.classes + 2, (1, *self.size), dtype=torch.uint8, generator=generator)
            for _ in range(2)
        )
        targets[targets == self.classes + 1] = IGNORE
        images = targets.to(device), labels.to(device)
        return lambda: (confusion_counts(*images, self.classes, backend=backend),)
