"""Tile sizes of the convolution kernels by GPU architecture and shape.

Times of an H200 (benchmarks/results/h200/tiles.csv) chose those of wide 1x1 convolutions on
``sm_90``; no others were chosen by timing.

The tiles of ``sm_80`` fit the 99 KB of shared memory that every NVIDIA GPU from Ampere on has, so
they serve all GPUs without a table of their own. The tiles of ``gfx942`` fit AMD's 64 KB.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import torch

from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.tile import Tile

# Classes of shapes. wide: more than 128 outputs, enough pixels to fill a GPU with the widest tile,
# and no float32 residual, for which the widest tile lacks registers; medium: more than 64 outputs;
# narrow: up to 64; odd: input channels that are no multiple of 64. ``conv_rows`` splits wide 1x1
# convolutions off. shallow: up to 256 input channels; deep: more. ``conv_taps`` has two classes of
# its own. few: up to 32 outputs; many: more.
_CLASSES = {
    "conv_rows": ("wide", "medium", "narrow", "shallow", "deep"),
    "conv_pointers": ("wide", "medium", "narrow", "odd"),
    "conv_taps": ("few", "many"),
}
_WIDE_PIXELS = 16384
_SHALLOW = 256
_HALF = ("bf16", "fp16")

# BLOCK_M, BLOCK_O, BLOCK_C, warps, stages per class, by (arch, precision of the products); "half"
# stands for bf16 and fp16. These are the largest sizes that compile without spills. Shallow and
# deep have smaller ones on sm_90, of which several programs fit a multiprocessor: an H200 took 15
# to 34% less time with a residual, and 18% less to 1% more without. ``conv_taps`` has no BLOCK_C;
# its sizes are small, because gathers need many programs on each multiprocessor.
_Sizes = tuple[int, ...]
BLOCKS = ("BLOCK_M", "BLOCK_O", "BLOCK_C")
_SIZES: dict[str, dict[tuple[str, str], tuple[_Sizes, ...]]] = {
    "conv_rows": {
        ("sm_90", "half"): (
            (128, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4),
            (64, 128, 64, 4, 3), (128, 128, 64, 4, 3),
        ),
        ("sm_100", "half"): (
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4),
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3),
        ),
    },
    "conv_pointers": {
        ("sm_80", "half"): (
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (128, 64, 32, 4, 4),
        ),
        ("sm_90", "half"): (
            (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 32, 4, 4),
        ),
        ("sm_100", "half"): (
            (128, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 32, 4, 4),
        ),
        ("gfx942", "half"): (
            (128, 128, 64, 8, 2), (128, 128, 64, 8, 2), (128, 64, 64, 4, 2), (128, 64, 32, 4, 2),
        ),
        ("sm_80", "ieee"): ((64, 64, 32, 4, 3),) * 4,
        ("sm_80", "tf32x3"): ((64, 64, 32, 8, 3),) * 4,
        ("sm_80", "tf32"): ((128, 64, 32, 8, 3),) * 4,
        ("sm_90", "ieee"): ((64, 64, 32, 8, 3),) * 4,
        ("sm_90", "tf32x3"): ((128, 64, 32, 8, 3),) * 4,
        ("sm_90", "tf32"): ((128, 128, 32, 8, 3),) * 4,
        ("sm_100", "ieee"): ((64, 64, 32, 8, 3),) * 4,
        ("sm_100", "tf32x3"): ((64, 64, 32, 8, 3),) * 4,
        ("sm_100", "tf32"): ((128, 64, 32, 8, 3),) * 4,
        ("gfx942", "ieee"): ((64, 64, 32, 4, 2),) * 4,
        ("gfx942", "tf32"): ((64, 64, 32, 4, 2),) * 4,
    },
    "conv_taps": {
        ("sm_80", "half"): ((256, 32, 8, 1), (256, 64, 8, 1)),
        ("sm_90", "half"): ((128, 32, 4, 1), (128, 64, 4, 1)),
        ("sm_100", "half"): ((128, 32, 4, 1), (128, 64, 4, 1)),
        ("gfx942", "half"): ((256, 32, 4, 1), (256, 64, 4, 1)),
        ("sm_80", "ieee"): ((64, 32, 8, 1),) * 2,
        ("sm_80", "tf32x3"): ((64, 32, 4, 1),) * 2,
        ("sm_80", "tf32"): ((128, 32, 4, 1), (128, 64, 4, 1)),
        ("sm_90", "ieee"): ((64, 32, 8, 1),) * 2,
        ("sm_90", "tf32x3"): ((64, 32, 4, 1), (64, 64, 4, 1)),
        ("sm_90", "tf32"): ((128, 32, 4, 1), (128, 64, 4, 1)),
        ("sm_100", "ieee"): ((64, 32, 8, 1),) * 2,
        ("sm_100", "tf32x3"): ((64, 32, 4, 1), (64, 64, 4, 1)),
        ("sm_100", "tf32"): ((128, 32, 4, 1), (128, 64, 4, 1)),
        ("gfx942", "ieee"): ((256, 32, 4, 1), (256, 64, 4, 1)),
        ("gfx942", "tf32"): ((256, 32, 4, 1), (256, 64, 4, 1)),
    },
}  # fmt: skip

# ``conv_expand_reduce``, half precision only, by input and reduced channels: BLOCK_M, BLOCK_O,
# warps, stages. The tile of x and the sums of all reduced channels limit the pixels of a program.
# No times chose them. On sm_90 two programs fit a multiprocessor. With 256 reduced channels one
# fits; its BLOCK_O is wider, so that the products read the tile of x from shared memory less often.
_EXPAND_REDUCE_DESCRIPTORS = {
    (64, 64): (128, 64, 8, 3), (64, 128): (128, 32, 8, 3), (128, 128): (128, 32, 8, 3),
    (128, 256): (128, 64, 8, 3), (256, 256): (128, 64, 8, 2),
}  # fmt: skip
EXPAND_REDUCE_CHANNELS = tuple(_EXPAND_REDUCE_DESCRIPTORS)  # on every architecture
_EXPAND_REDUCE = {
    "sm_80": dict.fromkeys(EXPAND_REDUCE_CHANNELS, (64, 32, 4, 2)) | {(64, 64): (128, 32, 8, 2)},
    "sm_90": _EXPAND_REDUCE_DESCRIPTORS,
    "sm_100": _EXPAND_REDUCE_DESCRIPTORS,
    "gfx942": dict.fromkeys(EXPAND_REDUCE_CHANNELS, (64, 32, 4, 2)),
}
DESCRIPTOR_ARCHS = ("sm_90", "sm_100")
ROW = 128  # BLOCK_M of every tile of ``conv_rows`` that reads rows of an image

# ``conv_boxes``, half precision on sm_90 only.
BOX = 128  # pixels of a tile
BOX_CHANNELS = 64  # 128 bytes: the longest row that shared memory keeps without bank conflicts
SLICE = 64  # output channels that are stored at once
_SHARED_MEMORY = 227 * 1024 - 512  # of an H100, less some for barriers
_FEWEST_BUFFERS, _MOST_BUFFERS = 3, 6  # of one step each
BOXES_OUTPUTS = (64, 128, 256)  # these have tiles of their own
_ALIGNED = 8  # channels of 16 bytes, as tensor descriptors need them


@functools.cache
def tile(
    kernel: str,
    arch: str,
    dtype: str,
    channels: int,
    outputs: int,
    pixels: int,
    precision: str = "ieee",
    residual: str | None = None,
    flat: bool = False,
) -> Tile:
    """The configuration of a kernel for a number of input channels, outputs and output pixels.

    ``precision`` matters for fp32 only; on gfx942, which has no tf32x3, ieee stands in for it.
    ``residual`` is the dtype of the residual, if there is one. ``flat`` says that ``conv_rows``
    reads all pixels as one row.
    """
    pixels = 0 if residual == "fp32" else pixels
    shape_class = _shape_class(kernel, channels, outputs, pixels, flat)
    return _tile(kernel, arch, dtype, shape_class, precision)


@functools.cache
def expand_reduce_tile(arch: str, dtype: str, planes: int, reduced: int) -> Tile:
    """The configuration of ``conv_expand_reduce``; dtype is bf16 or fp16."""
    block_m, block_o, num_warps, pipeline_stages = _EXPAND_REDUCE[arch][planes, reduced]
    meta = {"BLOCK_M": block_m, "BLOCK_O": block_o, "P": planes, "R": reduced}
    return Tile("conv_expand_reduce", arch, dtype, meta, num_warps, pipeline_stages)


@functools.cache
def boxes_tile(
    dtype: str,
    outputs: int,
    pixels: int,
    residual: torch.dtype | None,
    out: torch.dtype,
) -> Tile:
    """The configuration of ``conv_boxes``, with the most buffers that an H100 has memory for.

    OUTS buffers of SLICE channels hold parts of the output; with a residual, which is loaded ahead,
    a whole tile of it. BUFFERS is the number of buffers for input and weights. ``pixels`` are those
    of the whole batch; ``residual`` and ``out`` are dtypes.
    """
    slice_bytes = BOX * SLICE * out.itemsize
    if residual not in (None, out):  # else output and residual share a buffer
        slice_bytes += BOX * SLICE * residual.itemsize
    narrow, medium, wide = BOXES_OUTPUTS
    widest = narrow if outputs <= narrow else medium
    if outputs > medium and pixels >= _WIDE_PIXELS:
        widest = wide
    for block_o in (size for size in reversed(BOXES_OUTPUTS) if size <= widest):
        slices = block_o // SLICE
        outs = slices if residual else min(slices, 4 // out.itemsize)
        step = (BOX + block_o) * BOX_CHANNELS * 2
        buffers = min(_MOST_BUFFERS, (_SHARED_MEMORY - outs * slice_bytes) // step)
        if buffers >= _FEWEST_BUFFERS:
            break
    meta = {"BLOCK_O": block_o, "BUFFERS": buffers, "OUTS": outs}
    return Tile("conv_boxes", "sm_90", dtype, meta, 8, 1)


def has_boxes(arch: str, dtype: str) -> bool:
    """Whether ``conv_boxes`` has tiles."""
    return arch == "sm_90" and dtype in _HALF


def why_not_boxes(arch: str, dtype: str, channels: int, outputs: int, stride: int) -> str | None:
    """What ``conv_boxes`` needs and does not get; None if it can run."""
    if not has_boxes(arch, dtype):
        return f"float16 or bfloat16 on an NVIDIA Hopper GPU, got {DTYPES[dtype]} on {arch}"
    if stride != 1:
        return f"stride 1, got {stride}"
    if channels % BOX_CHANNELS or outputs % _ALIGNED:
        multiples = f"input channels in multiples of {BOX_CHANNELS}, outputs of {_ALIGNED}"
        return f"{multiples}, got {channels} and {outputs}"
    return None


@functools.cache
def box(batch: int, height: int, width: int) -> tuple[int, int, int]:
    """Images, rows and columns of the boxes of BOX pixels that cover a batch with fewest boxes.

    Each is a power of two. Among equals the longest rows win, then the fewest images.
    """
    sides = [2**i for i in range(BOX.bit_length())]
    boxes = [
        (BOX // (rows * columns), rows, columns)
        for columns in reversed(sides)
        for rows in reversed(sides)
        if rows * columns <= BOX
    ]

    def count(box: tuple[int, int, int]) -> int:
        return math.prod(
            -(-size // side) for size, side in zip((batch, height, width), box, strict=True)
        )

    return min(boxes, key=count)


def _shape_class(kernel: str, channels: int, outputs: int, pixels: int, flat: bool) -> str:
    if kernel == "conv_taps":
        return "few" if outputs <= 32 else "many"
    if channels % 64:
        return "odd"
    if outputs <= 64:
        return "narrow"
    if outputs <= 128 or pixels < _WIDE_PIXELS:
        return "medium"
    if not flat:
        return "wide"
    return "shallow" if channels <= _SHALLOW else "deep"


def _tile(kernel: str, arch: str, dtype: str, shape_class: str, precision: str) -> Tile:
    if dtype != "fp32" or (arch == "gfx942" and precision == "tf32x3"):
        precision = "ieee"
    products = precision if dtype == "fp32" else "half"
    sizes = _SIZES[kernel][arch, products][_CLASSES[kernel].index(shape_class)]
    return _as_tile(kernel, arch, dtype, sizes, {"PRECISION": precision})


def _as_tile(kernel: str, arch: str, dtype: str, sizes: tuple[int, ...], meta: dict) -> Tile:
    *blocks, num_warps, pipeline_stages = sizes
    meta = dict(zip(BLOCKS, blocks, strict=False)) | meta
    return Tile(kernel, arch, dtype, meta, num_warps, pipeline_stages)


def _shipped() -> Iterator[Tile]:
    for kernel, table in _SIZES.items():
        for (arch, products), rows in table.items():
            for dtype in _HALF if products == "half" else ("fp32",):
                for shape_class in dict(zip(rows, _CLASSES[kernel], strict=True)).values():
                    yield _tile(kernel, arch, dtype, shape_class, products)
    for arch, by_channels in _EXPAND_REDUCE.items():
        for dtype in _HALF:
            for channels in by_channels:
                yield expand_reduce_tile(arch, dtype, *channels)
    for dtype in _HALF:
        half, single = DTYPES[dtype], torch.float32
        kinds = itertools.product(BOXES_OUTPUTS, (None, half, single), (half, single))
        for outputs, residual, out in kinds:
            yield boxes_tile(dtype, outputs, _WIDE_PIXELS, residual, out)


SHIPPED = tuple(_shipped())
