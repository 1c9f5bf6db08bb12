"""From low-resolution logits to labels: mmsegmentation's sequence at full size, and ours."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.options import OUR_BACKENDS, Selection
from emanet_triton.bench.peers import compiled, full_size_logits, without_gradients
from emanet_triton.bench.suite import Suite
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import Size, logits_grid, view_sizes
from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.resample.op import Taps, resample_labels
from emanet_triton.models.protocol import Protocol

CLASSES = 19
CLEAR = 1e-5  # a label counts if the two best probabilities in float64 differ by more
CLEAR_SHARE = 0.999  # of pixels, at least
# The share of clear labels that may be wrong. The plain sequence in float32 rounds the positions
# that it reads from; ours may get none wrong.
BOUNDS = {"plain": 1e-3, "plain-compiled": 1e-3}


@dataclass(frozen=True)
class View:
    """The logits of one view.

    Attributes:
        size: (height, width) of the network's input.
        mirrored: whether the input was mirrored.
        logits: [windows, classes, h, w].
    """

    size: Size
    mirrored: bool
    logits: Tensor


@dataclass(frozen=True)
class Problem:
    """The logits that a network would have given for one image.

    Attributes:
        protocol: how the image was resized and cut into windows.
        ms_flip: whether there are six scales, plain and mirrored.
        size: (height, width) of the image.
        views: the logits of each view.
        packed: the logits of all views as the predictor leaves them, [1, classes, P].
    """

    protocol: Protocol
    ms_flip: bool
    size: Size
    views: list[View]
    packed: Tensor

    def plain(self) -> Tensor:
        """Resize, softmax, mirror, average, argmax at full size, in mmseg's order: [1, H, W]."""
        return self.probabilities(torch.float32).argmax(1)

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        """The averaged probabilities of all views [1, classes, H, W]."""
        parts = (self._full_size(view, dtype) for view in self.views)
        total = next(parts)
        for part in parts:
            total.add_(part)
        return total / len(self.views)

    def tables(self) -> tuple[Taps, Taps]:
        """Which logits of ``packed`` the rows and the columns of the image read."""
        device = self.packed.device
        return tap_tables(self.protocol, self.size, self.ms_flip, device)

    def taps(self, backend: str) -> Tensor:
        """The labels as the predictor makes them: uint8 [1, H, W]."""
        return resample_labels(self.packed, *self.tables(), backend=backend)

    def _full_size(self, view: View, dtype: torch.dtype) -> Tensor:
        logits = full_size_logits(view.logits.to(dtype), view.size, self.size, self.protocol)
        probabilities = logits.softmax(1)
        return probabilities.flip(3) if view.mirrored else probabilities


def make_problem(
    protocol: Protocol, ms_flip: bool, size: Size, dtype: torch.dtype, device: str
) -> Problem:
    """Random logits of stride 8 for every view of an image of (height, width)."""
    generator = torch.Generator().manual_seed(0)
    views = []
    for scale in view_sizes(protocol, size, ms_flip):
        windows, *low = logits_grid(protocol, scale)
        for mirrored in (False, True) if ms_flip else (False,):
            logits = 4 * torch.randn(windows, CLASSES, *low, generator=generator)
            views.append(View(scale, mirrored, logits.to(device, dtype)))
    packed = torch.cat([view.logits.transpose(0, 1).flatten(1) for view in views], 1)
    return Problem(protocol, ms_flip, size, views, packed[None])


def cases(selection: Selection) -> Iterator[Case]:
    """Whole and sliding inference, one view and ms+flip, to labels of the image's size.

    On a GPU also from logits in bfloat16, the dtype of its fastest network.
    """
    sizes = selection.sizes or ([(40, 64)] if selection.tiny else [(1024, 2048)])
    short = selection.quick and not selection.cuda
    dtypes = ["bf16", "fp32"] if selection.cuda and not selection.tiny else ["fp32"]
    for size, dtype in itertools.product(sizes, selection.dtypes or dtypes):
        yield _case(selection, "whole", False, size, dtype)
        if not short:
            yield _case(selection, "slide", False, size, dtype)
            yield _case(selection, "whole", True, size, dtype)
            yield _case(selection, "slide", True, size, dtype)


def _case(selection: Selection, mode: str, ms_flip: bool, size: Size, dtype: str) -> Case:
    height, width = size
    protocol = make_protocol(mode, size, selection.tiny)
    arguments = protocol, ms_flip, size, DTYPES[dtype], selection.device
    problem = functools.cache(functools.partial(make_problem, *arguments))
    exact = functools.cache(lambda: clear_labels(problem()))
    slow = selection.short or (ms_flip and not selection.cuda)  # twelve views: minutes, and 10 GB
    names = ["plain", "plain-compiled", *selection.ours]
    return Case(
        suite=SUITE.name,
        name=f"{mode}{' ms+flip' if ms_flip else ''} {height}x{width} {dtype}",
        providers=selection.pick(
            {name: functools.partial(provide, name, problem) for name in names},
            "plain",
            ("plain-compiled",) if slow else (),
        ),
        baseline="plain",
        error=lambda got: wrong_share(got, *exact()),
        bound=bound,
        prepare=problem,
        dtype=dtype,
        peak=True,
        graph=True,
    )


def bound(name: str, _: Mapping[str, float]) -> float:
    return BOUNDS.get(name, 0.0)


def provide(name: str, make: Callable[[], Problem]) -> Call:
    problem = make()
    if name in OUR_BACKENDS:
        return without_gradients(problem.taps, OUR_BACKENDS[name])
    return without_gradients(compiled(problem.plain) if name == "plain-compiled" else problem.plain)


@torch.inference_mode()
def clear_labels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels [1, H, W] in float64, and where its two best classes are not about equal."""
    exact = problem.probabilities(torch.float64)
    best = exact.topk(2, dim=1).values
    return exact.argmax(1), best[:, 0] - best[:, 1] > CLEAR


def wrong_share(got: Tensor, want: Tensor, clear: Tensor) -> float:
    """The share of clear pixels whose label is wrong; NaN if few pixels are clear."""
    if got.shape != want.shape or clear.double().mean() < CLEAR_SHARE:
        return float("nan")
    return ((got != want) & clear).sum().item() / clear.sum().item()


SUITE = Suite(
    name="post",
    title="From low-resolution logits to labels",
    measures="logits to labels: whole, sliding window, six scales with mirroring",
    cases=cases,
    text="""\
`plain` resizes the logits to the image's size and then takes softmax and argmax, as mmsegmentation
does; `plain-compiled` is the same by `torch.compile`. `ours-torch` and `triton` are our operator,
which never stores logits of the image's size: its PyTorch version, and the Triton kernel.""",
)
