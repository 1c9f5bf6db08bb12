"""Comparing what a written file computes with what this package computes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from emanet_triton.deploy.formats import Format, Runner
from emanet_triton.deploy.parts import IMAGE_TO_LABELS, LOGITS
from emanet_triton.deploy.program import Request, least_side
from emanet_triton.errors import InputError, describe
from emanet_triton.inference.inputs import normalise
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite
from emanet_triton.inference.views import Size
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.models.fused import fuse_if_possible

# The largest error of logits, relative to the largest logit. Labels may differ where the logits of
# two classes differ by twice as much.
LOGITS_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
_COARSE = 24  # pixels of a side of the squares in the images that are compared


@dataclass(frozen=True)
class Check:
    """A comparison for one input.

    Attributes:
        batch: images of the input.
        size: their (height, width) in pixels.
        error: of logits, relative to the largest logit; of labels the share that differs.
        beyond: labels that differ although the logits of the two classes are no near-tie.
        allowed: the largest error of logits, or the largest difference of logits in a near-tie,
            relative to the largest logit.
    """

    batch: int
    size: Size
    error: float
    beyond: int | None
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed if self.beyond is None else self.beyond == 0

    def __str__(self) -> str:
        height, width = self.size
        input_ = f"{self.batch} image{'s' if self.batch > 1 else ''} of {height}x{width}"
        if self.beyond is None:
            return f"{input_}: logits, relative error {self.error:.1e} (at most {self.allowed:g})"
        return (
            f"{input_}: {self.error:.4%} of the labels differ, {self.beyond} of them by more than "
            f"a near-tie (logits within {self.allowed:g} times the largest)"
        )


def checks(format_: Format, path: Path, named: Path, request: Request) -> Iterator[Check]:
    """Run a file on images and compare the results, one input after the other.

    A file for all sizes is run on three sizes. The comparison is with the fused network of the same
    precision.

    Args:
        format_: of the file.
        path: of the file.
        named: the file's name in messages.
        request: what the file computes.

    Raises:
        InputError: the file does not open or run, its runtime is not installed, or the network's
            logits are not finite.
    """
    run = _opened(format_, path, named, request)
    try:
        network = fuse_if_possible(request.model, request.dtype) or request.model
    except ValueError as error:
        raise InputError(f"{named}: cannot be compared: {error}") from None
    protocol = request.protocol
    if request.part != IMAGE_TO_LABELS:  # the network's input has its size already
        protocol = replace(protocol, base_scale=None)
    predictor = Predictor(network, protocol)
    for batch, size in _inputs(request):
        images = [example_image(size, seed) for seed in range(batch)]
        given = torch.from_numpy(np.stack(images)).to(request.device)
        if request.part != IMAGE_TO_LABELS:
            given = normalise(given, request.model).contiguous()
        elif request.single:
            given = given[0]
        try:
            with cuda_fp32("ieee"):
                got = run(given).cpu()
        except Exception as error:  # runtimes raise many types
            shape = "x".join(map(str, given.shape))
            raise InputError(f"{named}: fails on an input of {shape} ({describe(error)})") from None
        if request.part == LOGITS:
            with torch.no_grad():
                wanted = network(given).float().cpu()
            if not wanted.isfinite().all():
                raise InputError(f"{named}: cannot be compared: {NOT_FINITE_MESSAGE}")
            yield logits_check(got, wanted, batch, size, request.precision)
        else:
            got = got[None] if request.single else got
            try:
                each = [wanted_labels(predictor, image) for image in images]
            except InputError as error:
                raise InputError(f"{named}: cannot be compared: {error}") from None
            yield labels_check(got, each, request.precision)


def example_image(size: Size, seed: int) -> np.ndarray:
    """A uint8 RGB image [height, width, 3] of coloured spots with noise."""
    height, width = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // _COARSE + 2, width // _COARSE + 2, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng.integers(-12, 13, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def _opened(format_: Format, path: Path, named: Path, request: Request) -> Runner:
    try:
        return format_.run(path, request)
    except InputError:
        raise
    except Exception as error:  # runtimes raise many types
        raise InputError(f"{named}: cannot be loaded again ({describe(error)})") from None


def _inputs(request: Request) -> list[tuple[int, Size]]:
    """(batch, size) of each comparison.

    For all sizes: the size of the request, one of half its sides, and an upright one, as narrow as
    possible.
    """
    if not request.dynamic:
        return [(request.batch or 1, request.size)]
    height, width = request.size
    least = least_side(request.model)
    half = max(height // 2 + 1, least), max(width // 2 - 1, least)
    return [(1, request.size), (2, half), (3, (max(width // 3, least), least))]


def logits_check(got: Tensor, wanted: Tensor, batch: int, size: Size, precision: str) -> Check:
    """Compare logits, for ``batch`` images of ``size``, on the CPU."""
    if (got.shape, got.dtype) != (wanted.shape, torch.float32):
        return Check(batch, size, float("inf"), None, LOGITS_ERROR[precision])
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    # NaN would pass no comparison, and would be no number to print.
    value = float(error) if error.isfinite() else float("inf")
    return Check(batch, size, value, None, LOGITS_ERROR[precision])


class Wanted(NamedTuple):
    """What a predictor computes for an image.

    Attributes:
        labels: uint8 [H, W], on the CPU.
        logits: float32 [classes, H, W], but for a number that all classes of a pixel share.
        largest: the largest of the network's logits, without its sign.
    """

    labels: Tensor
    logits: Tensor
    largest: float


def wanted_labels(predictor: Predictor, image: np.ndarray) -> Wanted:
    """Segment a uint8 RGB image [H, W, 3].

    Raises:
        InputError: the network's logits are not finite.
    """
    largest = 0.0

    def seen(logits: Tensor) -> Tensor:
        nonlocal largest
        largest = float(logits.abs().max())
        return logits

    (labels,), (found,) = predictor.results([image], probabilities=True, adjust=seen)
    if not are_finite(labels):
        raise InputError(NOT_FINITE_MESSAGE)
    return Wanted(labels.cpu(), found.log().cpu(), largest)


def labels_check(got: Tensor, wanted: Sequence[Wanted], precision: str) -> Check:
    """Compare labels with those that are wanted, for images of one size.

    Args:
        got: uint8 [B, H, W], on the CPU; all of another shape or dtype is wrong.
        wanted: for each image.
        precision: of the network that computed ``got``, a key of ``LOGITS_ERROR``.
    """
    size: Size = tuple(wanted[0].labels.shape)  # type: ignore[assignment]
    near = 2 * LOGITS_ERROR[precision]
    if (got.shape, got.dtype) != ((len(wanted), *size), torch.uint8):
        return Check(len(wanted), size, 1.0, len(wanted) * math.prod(size), near)
    differing = beyond = 0
    for labels, (right, logits, largest) in zip(got, wanted, strict=True):
        differs, no_class = right != labels, labels >= len(logits)
        best = logits.gather(0, right[None].long())
        given = logits.gather(0, labels.masked_fill(no_class, 0)[None].long())
        differing += int(differs.sum())
        beyond += int((differs & (no_class | (best - given > near * largest)[0])).sum())
    return Check(len(wanted), size, differing / got.numel(), beyond, near)
