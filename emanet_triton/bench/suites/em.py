"""The EM attention operators against mmsegmentation's operations, over sizes, batches, dtypes."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Shape, attention_floor, block_floor
from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import compiled, mmseg_attention, without_gradients
from emanet_triton.kernels.em import op as ops
from emanet_triton.kernels.em import reference
from emanet_triton.models.network import logits_size

BN_EPS = 1e-5
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
FLOORS = {"attention": attention_floor, "block": block_floor}

# Milliseconds of Triton's kernels by operation, dtype, B and N, on an H100; nothing measured. The
# first is the forecast of a review of commit 54dbbc2, the second that of ``kernels.cost``.
PREDICTED_MS = {
    ("block", "bf16", 1, 32768): "0.2-0.23",
    ("block", "bf16", 8, 32768): "1.1-1.2",
}
MODELLED_MS = {
    ("block", "bf16", 1, 32768): "0.14-0.175",
    ("block", "bf16", 8, 32768): "0.77-1.04",
}
COMPILED = ("block", "bf16", 1, 32768)  # on a GPU, the case whose peer is compiled unasked


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
    size: Size,
    channels: int = 512,
    bases: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Problem:
    """Features as after a ReLU and layers of an ordinary scale, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tensors = [
        normal(batch, channels, *size).relu_(),
        F.normalize(normal(1, channels, bases), dim=1),
        2 * normal(channels, channels, 1, 1) / channels**0.5,
        normal(channels),
        normal(channels, channels, 1, 1) / channels**0.5,
        *(normal(channels), 0.5 + normal(channels).abs(), normal(channels), normal(channels)),
    ]
    feats, *rest = (t.to(dtype) for t in tensors)
    return Problem(feats.contiguous(memory_format=memory_format), *rest[:4], tuple(rest[4:]))


def mmseg_block(problem: Problem, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """The operations of mmseg's ``EMAHead`` from ema_mid_conv to the residual's ReLU."""
    x = F.conv2d(problem.feats, problem.mid_weight, problem.mid_bias)
    recon, bases = mmseg_attention(x, problem.bases, num_stages)
    recon = F.relu(recon, inplace=True)
    recon = F.batch_norm(F.conv2d(recon, problem.out_weight), *problem.bn, eps=BN_EPS)
    return F.relu(problem.feats + recon, inplace=True), bases


def cases(selection: Selection) -> Iterator[Case]:
    """Both operators at every batch, size, dtype and layout."""
    sizes, batches, dtypes, layouts = _defaults(selection)
    for dtype, size, batch, layout, operation in itertools.product(
        selection.dtypes or dtypes,
        selection.sizes or sizes,
        selection.batches or batches,
        layouts,
        FLOORS,
    ):
        yield _case(selection, operation, batch, size, dtype, layout)


def _defaults(selection: Selection) -> tuple[Sequence, ...]:
    """Sizes of images, batches, dtypes, layouts."""
    if selection.tiny:
        return [(24, 40)], [2], ["fp32"], ["channels-last"]
    if selection.quick:
        dtypes, batches = (["bf16"], [1, 8]) if selection.cuda else (["fp32"], [1])
        return [(512, 1024)], batches, dtypes, ["channels-last"]
    sizes = [(512, 1024), (769, 769), (1024, 2048)]
    if selection.cuda:
        return [*sizes, (2048, 4096)], [1, 4, 8], ["bf16", "fp16", "fp32"], ["channels-last"]
    return sizes, [1], ["fp32"], list(LAYOUTS)


def _case(
    selection: Selection, operation: str, batch: int, image: Size, dtype: str, layout: str
) -> Case:
    height, width = logits_size(*image)
    channels, bases = (16, 5) if selection.tiny else (512, 64)
    shape = Shape(batch, height * width, channels, bases, dtype=dtype)
    problem = functools.cache(
        functools.partial(
            make_problem,
            *(batch, (height, width), channels, bases),
            dtype=DTYPES[dtype],
            device=selection.device,
            memory_format=LAYOUTS[layout],
        )
    )
    exact = functools.cache(lambda image: float64(operation, problem(), image))
    names = _providers(selection)
    key = operation, dtype, batch, height * width
    slow = () if selection.cuda and key == COMPILED else ("mmseg-compiled",)
    return Case(
        suite="em",
        name=f"{operation} B={batch} N={height * width} {dtype} {layout}",
        providers=selection.pick(
            {name: functools.partial(provide, name, operation, problem) for name in names},
            "mmseg",
            slow,
        ),
        baseline="mmseg",
        error=lambda got: worst_error(got, exact, batch),
        bound=three_way,
        prepare=problem,
        floor=FLOORS[operation](shape),
        dtype=dtype,
        predicted_ms={"triton": PREDICTED_MS[key]} if key in PREDICTED_MS else {},
        peak=selection.cuda,
        graph=True,
    )


def _providers(selection: Selection) -> list[str]:
    if selection.cuda:
        return ["mmseg", "mmseg-compiled", "torch", "triton"]
    return ["mmseg", "mmseg-compiled", "torch"]


def provide(name: str, operation: str, problem: Callable[[], Problem]) -> Call:
    """A call that runs one provider on one problem: mmseg, torch or triton, and how."""
    who, _, how = name.partition("-")
    given, is_block = problem(), operation == "block"
    if who == "mmseg":
        function = mmseg_block if is_block else mmseg_attention
        arguments = (given,) if is_block else (given.feats, given.bases)
        function = compiled(function) if how == "compiled" else function
    else:
        operator = ops.em_attention_block if is_block else ops.em_attention
        function = functools.partial(operator, backend=who)
        arguments = given.block_arguments() if is_block else (given.feats, given.bases)
    return without_gradients(function, *arguments)


def three_way(_: str, errors: Mapping[str, float]) -> float:
    """At most twice what plain PyTorch in the same dtype makes."""
    return 2 * errors.get("mmseg", float("nan")) + 1e-6


def worst_error(
    got: Sequence[Tensor], exact: Callable[[int], Sequence[Tensor]], batch: int
) -> float:
    """The largest error of the first and of the last image, whose exact tensors are given."""
    errors = [relative_error(got, exact(image), image) for image in {0, batch - 1}]
    return max(errors, key=lambda error: (error != error, error))


def float64(operation: str, problem: Problem, image: int = 0) -> tuple[Tensor, Tensor]:
    """The specification in float64 on one image: [1, C, N] and [1, C, K]."""
    feats, *rest = (t.double() for t in problem.block_arguments())
    feats = feats[image : image + 1].flatten(2)
    if operation == "block":
        return reference.em_attention_block(feats, *rest)
    return reference.em_attention(feats, rest[0])


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], image: int = 0) -> float:
    """The largest difference of an image's tensors, over the largest magnitude wanted.

    Not a number, and so not below any bound, where ``got`` holds one that is not finite.
    """
    errors = []
    for g, w in zip(got, want, strict=True):
        difference = (g[image].reshape(w[0].shape).double() - w[0]).abs().max()
        errors.append((difference / w.abs().max()).item())
    return sum(errors) if any(e != e for e in errors) else max(errors)
