"""From low-resolution logits to labels: mmsegmentation's sequence at full size, and ours."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.networks import make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import compiled, full_size_logits, without_gradients
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import logits_grid, view_sizes
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.protocol import Protocol

CLASSES = 19
CLEAR = 1e-5  # labels count where float64's two best probabilities differ by more
CLEAR_SHARE = 0.999  # of pixels, at least
# Share of clear labels that may be wrong. In float32 the plain sequence itself rounds the
# positions that it reads from.
BOUNDS = {"plain": 1e-3, "plain-compiled": 1e-3}

# Milliseconds of Triton's kernel, by the case. Forecast of a review of commit 54dbbc2, H100,
# nothing measured.
PREDICTED_MS = {"whole 1024x2048 bf16": "0.07-0.1", "slide 1024x2048 bf16": "0.15-0.4"}


@dataclass(frozen=True)
class View:
    """What the network says of one view: its input's (height, width), logits [windows, C, h, w]."""

    size: tuple[int, int]
    mirrored: bool
    logits: Tensor


@dataclass(frozen=True)
class Problem:
    """The logits that a network would have given for one image of (height, width) ``size``.

    Once for each view, and once of all views as ``eval.inference`` has the network leave them.
    """

    protocol: Protocol
    ms_flip: bool
    size: tuple[int, int]
    views: list[View]
    packed: Tensor  # [1, C, P]

    def plain(self) -> Tensor:
        """Resize, softmax, mirror, average, argmax at full size, in mmseg's order: [1, H, W]."""
        return self.probabilities(torch.float32).argmax(1)

    def probabilities(self, dtype: torch.dtype) -> Tensor:
        total = None
        for view in self.views:
            each = self._full_size(view, dtype).softmax(1)
            each = each.flip(3) if view.mirrored else each
            total = each if total is None else total.add_(each)
        return total / len(self.views)

    def taps(self, backend: str) -> Tensor:
        """As ``eval.inference`` does it: uint8 [1, H, W]."""
        tables = tap_tables(self.protocol, self.size, self.ms_flip, self.packed.device)
        return resample_labels(self.packed, *tables, backend=backend)

    def _full_size(self, view: View, dtype: torch.dtype) -> Tensor:
        return full_size_logits(view.logits.to(dtype), view.size, self.size, self.protocol)


def make_problem(
    protocol: Protocol, ms_flip: bool, size: tuple[int, int], dtype: torch.dtype, device: str
) -> Problem:
    """Random logits of stride 8 for every view of an image of (height, width)."""
    generator = torch.Generator().manual_seed(0)
    views = []
    for scale in view_sizes(protocol, size, ms_flip):
        windows, *low = logits_grid(protocol, scale)
        shape = windows, CLASSES, *low
        for mirrored in (False, True) if ms_flip else (False,):
            logits = 4 * torch.randn(shape, generator=generator)
            views.append(View(scale, mirrored, logits.to(device, dtype)))
    packed = torch.cat([view.logits.transpose(0, 1).flatten(1) for view in views], 1)
    return Problem(protocol, ms_flip, size, views, packed[None])


def cases(selection: Selection) -> Iterator[Case]:
    """Whole and sliding inference, one view and ms+flip, to labels of the image's size.

    On a GPU by default from logits in bfloat16, too, which its fastest network gives.
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
    names = ["plain", "plain-compiled", "torch"]
    names += ["triton"] if selection.cuda else []
    name = f"{mode}{' ms+flip' if ms_flip else ''} {height}x{width} {dtype}"
    return Case(
        suite="post",
        name=name,
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
        predicted_ms={"triton": PREDICTED_MS[name]} if name in PREDICTED_MS else {},
        peak=True,
        graph=True,
    )


def bound(name: str, _: Mapping[str, float]) -> float:
    return BOUNDS.get(name, 0.0)


def provide(name: str, make: Callable[[], Problem]) -> Call:
    problem = make()
    if name.startswith("plain"):
        function = problem.plain if name == "plain" else compiled(problem.plain)
        return without_gradients(function)
    return without_gradients(problem.taps, name)


@torch.inference_mode()
def clear_labels(problem: Problem) -> tuple[Tensor, Tensor]:
    """Labels [1, H, W] by float64, and where its two best classes are not about equal."""
    exact = problem.probabilities(torch.float64)
    best = exact.topk(2, dim=1).values
    return exact.argmax(1), best[:, 0] - best[:, 1] > CLEAR


def wrong_share(got: Tensor, want: Tensor, clear: Tensor) -> float:
    """The share of clear pixels whose label is wrong; not a number where few are clear."""
    if got.shape != want.shape or clear.double().mean() < CLEAR_SHARE:
        return float("nan")
    return ((got != want) & clear).sum().item() / clear.sum().item()
