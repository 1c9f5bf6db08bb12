"""Choose how often E and M step read the features on a GPU: once each, or once together.

The backends of one pass also end the block with a kernel of their own.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emanet_triton.kernels import choice
from emanet_triton.kernels.checks import ALIGNMENT, OPEN_BACKENDS, fits_descriptor
from emanet_triton.kernels.device import DTYPE_NAMES, gluon_arch
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.exact import Check, wider
from emanet_triton.kernels.precision import cuda_fp32

Outputs = tuple[Tensor, Tensor]  # [B, N, C] and the bases [B, C, K]

# Backends that ``"fastest"`` may mean on a GPU, the default first, and the ranges of each.
RANGES: dict[str, int | None] = {"triton": None, **tiles.ONE_PASS}


def why_not_one_pass(feats: Tensor, num_bases: int) -> str | None:
    """What one pass over ``feats`` [B, N, C] needs and does not get; None if it can run."""
    arch = gluon_arch(feats)
    if not tiles.has_one_pass(arch, DTYPE_NAMES[feats.dtype]):
        return f"float16 or bfloat16 on an NVIDIA Hopper GPU, got {feats.dtype} on {arch}"
    channels = feats.shape[2]
    if channels != tiles.ONE_PASS_CHANNELS or num_bases > tiles.ONE_PASS_BASES:
        sizes = f"{tiles.ONE_PASS_CHANNELS} channels and at most {tiles.ONE_PASS_BASES} bases"
        return f"{sizes}, got {channels} and {num_bases}"
    if not fits_descriptor(feats):
        return f"channels-last features whose positions begin at multiples of {ALIGNMENT} bytes"
    return None


@dataclass(frozen=True)
class OutputCheck(Check):
    """Measures the error of one of the two outputs against the operator in a wider dtype.

    Attributes:
        x: the features, [B, N, C].
        out_shape, out_dtype, plain: as in ``Check``.
        exact: computes the outputs of an image, given its number.
        output: which of them.
    """

    x: Tensor
    out_shape: torch.Size
    out_dtype: torch.dtype
    plain: Callable[[], Tensor]
    exact: Callable[[int], Outputs]
    output: int

    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        for image in range(len(self.x)):
            yield slice(image, image + 1), self.exact(image)[self.output]


def run(
    backend: str,
    feats: Tensor,
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    by_triton: Callable[[int | None], Outputs],
    by_torch: Callable[..., Outputs],
) -> Outputs:
    """Run an operator of EM attention by Triton kernels.

    Args:
        backend: one of ``RANGES``; ``"auto"`` for ``"triton"``, since no GPU has run the others;
            ``"fastest"``, which measures at the first call of a number of positions, whatever the
            batch; or ``"fastest-known"``, which takes what ``"fastest"`` has chosen earlier.
        feats: [B, N, C].
        tensors: the bases and, for the block, the weights.
        options: the options that decide the outputs.
        by_triton: runs the kernels, given ``ranges``.
        by_torch: takes feats, tensors and options.

    Raises:
        ValueError: one pass was asked for and cannot run.
    """
    if backend == "auto":
        backend = "triton"
    if backend != "triton":
        why_not = why_not_one_pass(feats, tensors[0].shape[2])
        if why_not and backend not in OPEN_BACKENDS:
            raise ValueError(f"backend {backend!r} needs {why_not}")
        if why_not:
            backend = "triton"
        elif backend == "fastest":
            backend = _fastest(feats, tensors, options, by_triton, by_torch)
        elif backend == "fastest-known":
            found = choice.known(_key_of(feats, tensors, options), feats.device, "em")
            backend = found if found in RANGES else "triton"
    return by_triton(RANGES[backend])


def _fastest(
    feats: Tensor,
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    by_triton: Callable[[int | None], Outputs],
    by_torch: Callable[..., Outputs],
) -> str:
    calls = {name: functools.partial(by_triton, ranges) for name, ranges in RANGES.items()}
    bases, *weights = tensors
    dtype = wider(feats.dtype)

    def exact(image: int) -> Outputs:
        own = (t[image : image + 1] if len(t) > 1 else t for t in (feats, bases))
        with cuda_fp32("ieee"):
            return by_torch(*(t.to(dtype) for t in (*own, *weights)), *options)

    def plain(output: int) -> Tensor:
        return calls["triton"]()[output]

    def make_checks() -> list[OutputCheck]:
        shapes = feats.shape, torch.Size((len(feats), *bases.shape[1:]))
        return [
            OutputCheck(feats, shape, feats.dtype, functools.partial(plain, output), exact, output)
            for output, shape in enumerate(shapes)
        ]

    key = _key_of(feats, tensors, options)
    return choice.choose(key, feats.device, calls, "triton", make_checks, "em")


def _key_of(feats: Tensor, tensors: tuple[Tensor, ...], options: tuple[Any, ...]) -> str:
    bases, *weights = tensors
    return _key(feats.shape[1:], bases.shape[2], feats.dtype, bool(weights), options)


@functools.lru_cache(maxsize=4096)
def _key(
    feats: torch.Size, num_bases: int, dtype: torch.dtype, is_block: bool, options: tuple[Any, ...]
) -> str:
    """What a choice is made for."""
    operator = "EM attention block" if is_block else "EM attention"
    return f"{operator} of {list(feats)}, {num_bases} bases, {dtype}, options {list(options)}"
