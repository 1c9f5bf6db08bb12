"""The EM attention operators against mmsegmentation's operations, over sizes, batches, dtypes."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Absent, Case, worst
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.cost import Shape, attention_floor, block_floor
from emanet_triton.bench.options import OUR_BACKENDS, Selection
from emanet_triton.bench.peers import compiled, mmseg_attention, without_gradients
from emanet_triton.bench.suite import Suite
from emanet_triton.inference.views import Size
from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.em import op as ops
from emanet_triton.kernels.em import reference
from emanet_triton.kernels.em.passes import why_not_one_pass
from emanet_triton.kernels.em.tiles import ONE_PASS
from emanet_triton.models.network import logits_size

BN_EPS = 1e-5
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
BACKENDS = OUR_BACKENDS | {name: name for name in ONE_PASS}
FLOORS = {"attention": attention_floor, "block": block_floor}
SPREAD = 100.0  # times ordinary features: the logits of one position differ by hundreds
COMPILED = ("block", "bf16", 1, 32768)  # on a GPU only this runs the compiled peer unasked


@dataclass(frozen=True)
class Problem:
    """The inputs of one EM attention block, all of one dtype and device."""

    feats: Tensor  # [B, C, H, W]
    bases: Tensor  # [1, C, K]
    mid_weight: Tensor  # [C, C, 1, 1]
    mid_bias: Tensor  # [C]
    out_weight: Tensor  # [C, C, 1, 1], without the batch norm
    bn: tuple[Tensor, ...]  # running mean and variance, weight, bias: [C]

    def block_arguments(self) -> tuple[Tensor, ...]:
        """feats, bases and the weights of the block, with the batch norm folded in."""
        mean, var, weight, bias = (t.double() for t in self.bn)
        scale = weight / torch.sqrt(var + BN_EPS)
        folded = self.out_weight[:, :, 0, 0].double() * scale[:, None], bias - mean * scale
        mid = self.mid_weight[:, :, 0, 0], self.mid_bias
        return self.feats, self.bases, *mid, *(t.to(self.feats.dtype) for t in folded)


def make_problem(
    batch: int,
    size: Size,
    channels: int = 512,
    bases: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
    scale: float = 1.0,
) -> Problem:
    """Features as after a ReLU, and weights of an ordinary scale; the same at every call.

    Args:
        batch, channels: of the features.
        size: (height, width) of the features.
        bases: number of bases K.
        dtype, device: of all tensors.
        memory_format: of the features.
        scale: of the features. The logits grow with it.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tensors = [
        scale * normal(batch, channels, *size).relu_(),
        F.normalize(normal(1, channels, bases), dim=1),
        2 * normal(channels, channels, 1, 1) / channels**0.5,
        normal(channels),
        normal(channels, channels, 1, 1) / channels**0.5,
        *(normal(channels), 0.5 + normal(channels).abs(), normal(channels), normal(channels)),
    ]
    feats, initial, mid_weight, mid_bias, out_weight, *bn = (t.to(dtype) for t in tensors)
    feats = feats.contiguous(memory_format=memory_format)
    return Problem(feats, initial, mid_weight, mid_bias, out_weight, tuple(bn))


def mmseg_block(problem: Problem, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """The operations of mmseg's ``EMAHead`` from ema_mid_conv to the residual's ReLU."""
    x = F.conv2d(problem.feats, problem.mid_weight, problem.mid_bias)
    recon, bases = mmseg_attention(x, problem.bases, num_stages)
    mean, var, weight, bias = problem.bn
    recon = F.conv2d(F.relu(recon, inplace=True), problem.out_weight)
    recon = F.batch_norm(recon, mean, var, weight, bias, eps=BN_EPS)
    return F.relu(problem.feats + recon, inplace=True), bases


def cases(selection: Selection) -> Iterator[Case]:
    """Both operators at every batch, size, dtype and layout, then with logits that spread."""
    all_sizes, all_batches, all_dtypes, layouts = _defaults(selection)
    dtypes = selection.dtypes or all_dtypes
    sizes, batches = selection.sizes or all_sizes, selection.batches or all_batches
    for dtype, size, batch, layout, operation in itertools.product(
        dtypes, sizes, batches, layouts, FLOORS
    ):
        yield _case(selection, operation, batch, size, dtype, layout)
    if not selection.short:
        for dtype, operation in itertools.product(dtypes, FLOORS):
            yield _case(selection, operation, batches[0], sizes[0], dtype, "channels-last", SPREAD)


def _defaults(selection: Selection) -> tuple[Sequence[Any], ...]:
    """Sizes of images, batches, dtypes, layouts."""
    if selection.tiny:
        return [(24, 40)], [2], ["fp32"], ["channels-last"]
    if selection.quick:
        dtypes, batches = (["bf16"], [1, 8]) if selection.cuda else (["fp32", "bf16"], [1])
        return [(512, 1024)], batches, dtypes, ["channels-last"]
    sizes = [(512, 1024), (769, 769), (1024, 2048)]
    if selection.cuda:
        return [*sizes, (2048, 4096)], [1, 4, 8], ["bf16", "fp16", "fp32"], ["channels-last"]
    return sizes, [1], ["fp32", "bf16"], list(LAYOUTS)


def _case(
    selection: Selection,
    operation: str,
    batch: int,
    image: Size,
    dtype: str,
    layout: str,
    scale: float = 1.0,
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
            scale=scale,
        )
    )
    exact = functools.cache(lambda image: float64(operation, problem(), image))
    suffix = "" if scale == 1 else " spread"
    names = ["mmseg", "mmseg-compiled", *selection.ours]
    if selection.cuda and dtype != "fp32" and not selection.tiny and layout == "channels-last":
        names += ONE_PASS
    is_compiled = not selection.short
    if selection.cuda:
        is_compiled = (operation, dtype, batch, height * width) == COMPILED
    return Case(
        suite=SUITE.name,
        name=f"{operation} B={batch} N={height * width} {dtype} {layout}{suffix}",
        providers=selection.pick(
            {name: functools.partial(provide, name, operation, problem) for name in names},
            "mmseg",
            () if is_compiled else ("mmseg-compiled",),
        ),
        baseline="mmseg",
        error=lambda got: worst_error(got, exact, batch),
        bound=three_way,
        prepare=problem,
        floor=FLOORS[operation](shape),
        dtype=dtype,
        peak=selection.cuda,
        graph=True,
    )


def provide(name: str, operation: str, make: Callable[[], Problem]) -> Call:
    """A call that runs one provider on a problem.

    Raises:
        Absent: one pass cannot run on this GPU.
    """
    problem, is_block = make(), operation == "block"
    if name in ONE_PASS:
        why_not = why_not_one_pass(ops.as_positions(problem.feats), problem.bases.shape[2])
        if why_not:
            raise Absent(f"needs {why_not}")
    if name in BACKENDS:
        operator = ops.em_attention_block if is_block else ops.em_attention
        arguments = problem.block_arguments() if is_block else (problem.feats, problem.bases)
        return without_gradients(operator, *arguments, backend=BACKENDS[name])
    given = (problem,) if is_block else (problem.feats, problem.bases)
    function: Callable[..., Any] = mmseg_block if is_block else mmseg_attention
    return without_gradients(compiled(function) if name == "mmseg-compiled" else function, *given)


def three_way(_: str, errors: Mapping[str, float]) -> float:
    """Twice the error of plain PyTorch in the same dtype is the largest that passes."""
    return 2 * errors.get("mmseg", float("nan")) + 1e-6


def worst_error(
    got: Sequence[Tensor], exact: Callable[[int], Sequence[Tensor]], batch: int
) -> float:
    """The larger of the errors of the first and the last image, against exact tensors of each."""
    return worst(relative_error(got, exact(image), image) for image in {0, batch - 1})


def float64(operation: str, problem: Problem, image: int = 0) -> tuple[Tensor, Tensor]:
    """The specification in float64 on one image: [1, C, N] and [1, C, K]."""
    feats, bases, mid_weight, mid_bias, out_weight, out_bias = (
        t.double() for t in problem.block_arguments()
    )
    feats = feats[image : image + 1].flatten(2)
    if operation == "attention":
        return reference.em_attention(feats, bases)
    weights = mid_weight, mid_bias, out_weight, out_bias
    return reference.em_attention_block(feats, bases, *weights)


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor], image: int = 0) -> float:
    """The largest difference of an image's tensors, divided by the largest wanted magnitude.

    NaN, which no bound lets pass, if ``got`` holds a number that is not finite.
    """
    errors = []
    for g, w in zip(got, want, strict=True):
        difference = (g[image].reshape(w[0].shape).double() - w[0]).abs().max()
        errors.append((difference / w.abs().max()).item())
    return worst(errors)


SUITE = Suite(
    name="em",
    title="The EM attention operators",
    measures="the EM operators, by size, batch, dtype, memory layout and spread of the logits",
    cases=cases,
    text="""\
`mmseg` runs mmsegmentation's operations in PyTorch, `mmseg-compiled` the same by `torch.compile`.
`ours-torch` and `triton` are our operators: their PyTorch version, and the Triton kernels. With
`one-pass-128` and `one-pass-16` one kernel computes E and M step, and another kernel ends the block
([kernels.md](kernels.md#e-and-m-step-in-one-pass-on-a-gpu)). On a GPU `mmseg-compiled` runs unasked
only for the block, one 1024x2048 image, bf16. In the cases *spread* the logits of one position
differ by hundreds, so most responsibilities are too small for a normal number of float32; on many
processors operations on subnormal numbers take ten times as long.

In bf16 mmsegmentation's operations round the logits to bf16, and ours do not: the column `error` of
the files compares both with float64. With AMX a CPU multiplies bf16 up to eight times as fast as
float32, and mmsegmentation's attention of 8192 or 9409 positions in NCHW is faster than ours.
Before commit acb507b, on a CPU our operators ran in threads of a pool, which shared the cores with
PyTorch's waiting threads ([kernels.md](kernels.md#how-threads-wait-on-a-cpu)).

*Predicted* times are forecasts for an H100 or H200; [h200.md](h200.md) has them all.""",
)
