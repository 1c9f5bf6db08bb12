"""Launches on the meta device that together use every shipped configuration."""

import enum
import functools
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import ClassVar, NamedTuple
from unittest import mock

import torch

from emanet_triton.kernels import pixels
from emanet_triton.kernels.conv import expand_reduce as conv_expand_reduce
from emanet_triton.kernels.conv import hopper as conv_hopper
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.em import attention as em_attention
from emanet_triton.kernels.em import block as em_block
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.pool import max_pool as pool_triton
from emanet_triton.kernels.resample import gather as resample_triton
from emanet_triton.kernels.tile import ARCHS, FP32_PRECISIONS

# Kernels whose tiles depend on K, and kernels of the block that read features.
BY_BASES = ("em_e_step", "em_m_step")
EPILOGUE = ("em_epilogue",)
OF_FEATURES = (*BY_BASES, *EPILOGUE)
ONE_PASS = ("em_stage", "em_output")
# Other kernels of the one-pass backends: there they overlap.
OVERLAPPING = ("em_fold", "em_reduce", "em_project", "em_normalise")

HALF, SINGLE = None, torch.float32  # dtypes of a residual or an output: the images', or float32

# Batch, C, H, W, O, kernel, stride, dilation, whether there is a residual, its dtype, the output's
# dtype. They are layers of the networks, also at odd sizes and in part in float32, and use every
# tile.
CONVOLUTIONS = (
    (1, 512, 128, 256, 512, 3, 1, 4, True, HALF, HALF),
    (1, 128, 128, 256, 128, 3, 1, 1, False, HALF, HALF),
    (1, 64, 256, 512, 64, 3, 1, 1, True, HALF, HALF),
    (1, 64, 256, 512, 256, 1, 1, 1, True, HALF, HALF),  # expand
    (1, 512, 128, 256, 2048, 1, 1, 1, True, HALF, HALF),  # expand
    (1, 2048, 128, 256, 256, 3, 1, 1, False, HALF, SINGLE),
    (8, 2048, 97, 97, 256, 3, 1, 1, False, HALF, SINGLE),
    (1, 256, 128, 256, 256, 3, 1, 1, True, SINGLE, HALF),
    (1, 128, 256, 512, 128, 3, 2, 1, False, HALF, HALF),
    (1, 256, 256, 512, 512, 1, 2, 1, False, HALF, HALF),
    (2, 512, 97, 97, 512, 3, 1, 4, True, HALF, HALF),
    (1, 512, 97, 97, 512, 3, 1, 4, True, HALF, HALF),
    (2, 256, 193, 193, 512, 1, 2, 1, False, HALF, HALF),
    (2, 256, 97, 97, 256, 3, 1, 1, True, SINGLE, HALF),
    (1, 128, 97, 97, 128, 3, 1, 1, False, HALF, HALF),
    (1, 128, 193, 193, 128, 3, 2, 1, True, HALF, HALF),
    (1, 64, 193, 193, 64, 3, 1, 1, True, HALF, HALF),
    (1, 3, 1024, 2048, 32, 3, 2, 1, False, HALF, HALF),  # stem
    (1, 32, 512, 1024, 64, 3, 1, 1, False, HALF, HALF),  # stem
    (1, 64, 257, 257, 128, 3, 1, 1, False, HALF, HALF),  # the official EMANet's stem
    (1, 512, 65, 65, 512, 3, 1, 16, False, HALF, HALF),  # the official EMANet's last block
    (1, 256, 128, 256, 256, 3, 2, 1, False, HALF, HALF),  # output stride 16
    (1, 512, 128, 256, 1024, 1, 2, 1, False, HALF, HALF),  # output stride 16
    (1, 2048, 64, 128, 512, 3, 1, 1, False, HALF, SINGLE),  # head of 512 channels
    (1, 512, 64, 128, 512, 3, 1, 1, True, SINGLE, HALF),  # head of 512 channels
    (1, 512, 64, 128, 150, 1, 1, 1, False, HALF, HALF),  # logits
    (1, 512, 65, 65, 21, 1, 1, 1, False, HALF, HALF),  # logits
    (1, 256, 97, 97, 3, 1, 1, 1, False, HALF, HALF),  # logits
    (1, 7, 97, 97, 32, 3, 1, 1, True, SINGLE, HALF),  # with the most taps of ``conv_taps``
    (1, 7, 97, 97, 72, 3, 1, 1, True, HALF, SINGLE),  # the same, in the wider tile
)
# By ``conv_boxes``: every tile in a 3x3 convolution, and layers whose 1x1 convolutions are large.
BOXES = (
    *(
        (1, 128, 128, 256, outputs, 3, 1, 2, has_residual, residual, out)
        for outputs in conv_tiles.BOXES_OUTPUTS
        for has_residual, residual in ((False, HALF), (True, HALF), (True, SINGLE))
        for out in (HALF, SINGLE)
    ),
    (1, 512, 128, 256, 2048, 1, 1, 1, True, HALF, HALF),  # expand
    (8, 512, 97, 97, 2048, 1, 1, 1, True, HALF, HALF),  # expand
    (1, 1024, 128, 256, 2048, 1, 1, 1, False, HALF, HALF),  # the identity's convolution
    (8, 2048, 97, 97, 256, 3, 1, 1, False, HALF, SINGLE),
    (2, 512, 97, 97, 512, 3, 1, 4, False, HALF, HALF),
)
POOLINGS = {"whole": (1, 64, 512, 1024), "slide": (8, 64, 385, 385)}

CONFUSIONS = (19, 64, 150)  # numbers of classes
# How many views, taps along an axis, what is averaged, whether probabilities are wanted, positions
# of the logits. The taps are those of the rows of Cityscapes: in windows there are more.
RESAMPLINGS = {
    "single": (1, 2, "probabilities", False, 32768),
    "slide": (1, 4, "probabilities", False, 32768),
    "views": (12, 3, "probabilities", False, 32768),
    "slide-views": (12, 5, "probabilities", False, 32768),
    "probabilities": (12, 3, "probabilities", True, 32768),
    "logits": (12, 3, "logits", False, 32768),
    "probabilities-of-logits": (12, 3, "logits", True, 32768),
}
# Numbers of classes and their uses: all of 19 and of 150, and what differs for others.
RESAMPLED = {
    3: ("single",),
    19: tuple(RESAMPLINGS),
    21: ("single", "views", "logits"),
    64: ("views", "probabilities"),
    150: tuple(RESAMPLINGS),
    255: ("single", "views", "probabilities"),
}


# Each class of launches has ``arch`` and ``dtype``, as the table names them; ``note``, which tells
# apart uses with the same constants; ``kernels``, the names of the kernels of interest, or None for
# all; and ``run``, which launches on the meta device.


@dataclass(frozen=True)
class EMLaunch:
    """The EM attention or its block: channels-last maps are large, NCHW ones have odd sides."""

    arch: str
    dtype: str
    precision: str
    operator: str
    channels: int
    bases: int
    channels_last: bool = True
    out_relu: bool = False
    ranges: int | None = None
    kernels: tuple[str, ...] = tuple(dict.fromkeys(t.kernel for t in tiles.SHIPPED))

    @property
    def note(self) -> str:
        return "channels-last" if self.channels_last else "NCHW"

    def run(self) -> None:
        empty = functools.partial(torch.empty, dtype=DTYPES[self.dtype], device="meta")
        feats = empty(2, 32768, self.channels)
        if not self.channels_last:
            feats = empty(2, self.channels, 97 * 97).mT
        bases = empty(1, self.channels, self.bases)
        stages = 2 if self.ranges is None else 3  # the middle one is a kernel of its own
        how = self.precision, self.ranges
        with mock.patch.object(em_attention, "gpu_arch", lambda device: self.arch):
            if self.operator == "em_attention":
                em_attention.run_attention(feats, bases, stages, 0.0, *how)
            else:
                weight, bias = empty(self.channels, self.channels), feats[0, 0]
                convolutions = weight, bias, weight, bias
                em_block.run_block(feats, bases, *convolutions, stages, 0.0, self.out_relu, *how)


@dataclass(frozen=True)
class ConvLaunch:
    """One of ``CONVOLUTIONS``."""

    launcher: ClassVar[ModuleType] = conv_triton

    arch: str
    dtype: str
    precision: str
    layer: tuple
    kernels: None = None

    @property
    def note(self) -> str:
        *_, has_residual, residual_dtype, out_dtype = self.layer
        residual = self._name(residual_dtype) if has_residual else "none"
        return f"residual={residual} out={self._name(out_dtype)}"

    def _name(self, dtype: torch.dtype | None) -> str:
        return self.dtype if dtype is HALF else "fp32"

    def run(self) -> None:
        batch, c, height, width, o, kernel, stride, dilation, *rest = self.layer
        has_residual, residual_dtype, out_dtype = rest
        dtype = DTYPES[self.dtype]
        size = batch, o, (height - 1) // stride + 1, (width - 1) // stride + 1
        self.launcher.conv_bias_act(
            _image(dtype, batch, c, height, width), _image(dtype, o, c, kernel, kernel),
            torch.empty(o, device="meta"),
            _image(residual_dtype or dtype, *size) if has_residual else None,
            stride, dilation, out_dtype is HALF, out_dtype or dtype, self.precision, self.arch,
        )  # fmt: skip


class BoxesLaunch(ConvLaunch):
    """One of ``BOXES``."""

    launcher: ClassVar[ModuleType] = conv_hopper


@dataclass(frozen=True)
class ExpandReduceLaunch:
    """Two 1x1 convolutions: to four times as many channels, and from there to fewer."""

    arch: str
    dtype: str
    channels: int
    reduced: int
    note: str = "expand-reduce"
    kernels: None = None

    def run(self) -> None:
        dtype = DTYPES[self.dtype]
        outputs = 4 * self.channels
        weights = [
            _image(dtype, outputs, self.channels, 1, 1),
            _image(dtype, self.reduced, outputs, 1, 1),
        ]
        biases = [torch.empty(len(weight), dtype=dtype, device="meta") for weight in weights]
        x, residual = (_image(dtype, 1, c, 255, 511) for c in (self.channels, outputs))
        conv_expand_reduce.expand_reduce(x, weights, biases, residual, self.arch)


@dataclass(frozen=True)
class PoolLaunch:
    """The pooling of one of ``POOLINGS``."""

    arch: str
    dtype: str
    note: str
    kernels: None = None

    def run(self) -> None:
        pool_triton.max_pool(_image(DTYPES[self.dtype], *POOLINGS[self.note]), self.arch)


@dataclass(frozen=True)
class ResampleLaunch:
    """Labels, or probabilities too, of Cityscapes' size."""

    arch: str
    dtype: str
    classes: int
    note: str
    kernels: None = None

    @property
    def is_common(self) -> bool:
        """Whether it is a use of the published networks and of the evaluation."""
        return self.classes == 19 and self.note in ("single", "views")

    def run(self) -> None:
        views, taps, average, probabilities, positions = RESAMPLINGS[self.note]
        logits = torch.empty(1, self.classes, positions, dtype=DTYPES[self.dtype], device="meta")
        tables = [
            torch.empty(views, taps, n_out, dtype=kind, device="meta")
            for n_out in (1024, 2048)
            for kind in (torch.int32, torch.float32)
        ]
        resample_triton.resample(logits, tables, average=average, probabilities=probabilities)


@dataclass(frozen=True)
class ConfusionLaunch:
    """The confusion matrix of an image."""

    arch: str
    classes: int
    dtype: str = "uint8"
    note: str = "confusion"
    kernels: None = None

    def run(self) -> None:
        images = torch.empty(1, 1024, 2048, dtype=torch.uint8, device="meta")
        resample_triton.confusion(images, images, self.classes)


@dataclass(frozen=True)
class PixelsLaunch:
    """The normalisation of the pixels of an image."""

    arch: str
    dtype: str
    note: str = "pixels"
    kernels: None = None

    def run(self) -> None:
        image = torch.empty(1, 1024, 2048, 3, dtype=torch.uint8, device="meta")
        pixels.normalise(image, (1.0, 2.0, 3.0), (1.0, 2.0, 3.0), DTYPES[self.dtype])


OfImages = PoolLaunch | ResampleLaunch | ConfusionLaunch | PixelsLaunch
Launch = EMLaunch | ConvLaunch | ExpandReduceLaunch | OfImages


class Each(enum.IntEnum):
    """What is compiled once; the value counts the columns of ``gates.KEY`` that tell it apart."""

    KERNEL = 3  # by target and dtype
    TILE = 4
    USE = 5


class Group(NamedTuple):
    """Launches that one process compiles, and what of them it compiles once: the first."""

    launches: tuple[Launch, ...]
    each: Each = Each.USE


def groups(each: Each) -> list[Group]:
    """Launches on all targets.

    ``Each.USE`` compiles every tile in each of its uses, and ``Each.TILE`` every tile in its
    commonest use. ``Each.KERNEL`` compiles each kernel once in every dtype and precision, as a
    sample of the others. The kernels that overlap are kernels of their own in bfloat16.
    """
    found = [Group((launch,)) for launch in _em(each)]
    for arch, dtype, precision in dict.fromkeys(
        (tile.arch, tile.dtype, tile.meta.get("PRECISION", "ieee")) for tile in conv_tiles.SHIPPED
    ):
        launches: list[Launch] = [ConvLaunch(arch, dtype, precision, c) for c in CONVOLUTIONS]
        if dtype != "fp32":
            launches += [
                ExpandReduceLaunch(arch, dtype, *channels)
                for channels in conv_tiles.EXPAND_REDUCE_CHANNELS
            ]
        if conv_tiles.has_boxes(arch, dtype):
            launches += [BoxesLaunch(arch, dtype, precision, layer) for layer in BOXES]
        wanted = min(each, Each.TILE)
        if each > Each.KERNEL and (arch, dtype) == ("sm_90", "bf16"):
            wanted = Each.USE
        found.append(Group(tuple(launches), wanted))
    for arch in ARCHS:
        labels = [
            ResampleLaunch(arch, dtype, classes, note)
            for dtype, (classes, notes) in product(DTYPES, RESAMPLED.items())
            for note in notes
        ]
        if each == Each.KERNEL:
            labels = [launch for launch in labels if launch.is_common]
        found.append(Group((*labels, *(ConfusionLaunch(arch, classes) for classes in CONFUSIONS))))
        poolings = tuple(PoolLaunch(arch, *use) for use in product(DTYPES, POOLINGS))
        found.append(Group(poolings, Each.USE if each > Each.KERNEL else Each.TILE))
        found.append(Group(tuple(PixelsLaunch(arch, dtype) for dtype in DTYPES)))
    return found


def _em(each: Each) -> list[EMLaunch]:
    attention, block = "em_attention", "em_attention_block"
    outputs = ("em_reduce", "em_reconstruct")
    found = []
    for arch in ARCHS:
        for dtype in DTYPES:
            all_tiles = each > Each.KERNEL
            for precision in FP32_PRECISIONS if dtype == "fp32" else ("ieee",):
                if arch == "gfx942" and precision == "tf32x3":
                    continue  # served by ieee
                products = (arch, dtype, precision)
                found += [
                    EMLaunch(*products, block, 512, 64),
                    EMLaunch(*products, attention, 512, 64, kernels=outputs),
                ]
                if tiles.has_one_pass(arch, dtype):
                    overlap = OVERLAPPING if all_tiles or dtype == "bf16" else ()
                    one_pass = functools.partial(
                        EMLaunch, *products, channels=512, bases=64, ranges=128
                    )
                    found.append(one_pass(block, kernels=(*ONE_PASS, *overlap)))
                    if all_tiles:
                        found += [
                            one_pass(attention, kernels=(*ONE_PASS, *overlap)),
                            one_pass(block, out_relu=True, kernels=ONE_PASS),
                        ]
                if all_tiles:
                    found += [
                        EMLaunch(*products, block, 512, 64, out_relu=True, kernels=EPILOGUE),
                        EMLaunch(*products, block, 512, 128, kernels=OF_FEATURES),
                        EMLaunch(*products, block, 512, 256, kernels=BY_BASES),
                    ]
                if each == Each.USE:
                    found += [
                        EMLaunch(*products, attention, 512, 64, kernels=("em_e_step",)),
                        EMLaunch(*products, block, 512, 64, False, kernels=OF_FEATURES),
                        EMLaunch(*products, block, 512, 128, False, kernels=BY_BASES),
                        EMLaunch(
                            *products, attention, 512, 256, False, kernels=("em_reconstruct",)
                        ),
                        EMLaunch(*products, block, 512, 256, False, kernels=OF_FEATURES),
                    ]
            for channels in (64, 128, 256, 1024, 2048) if all_tiles else ():
                found += [
                    EMLaunch(arch, dtype, "ieee", attention, channels, 64, kernels=("em_reduce",)),
                    EMLaunch(arch, dtype, "ieee", block, channels, 64, kernels=("em_normalise",)),
                ]
    return found


def _image(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
