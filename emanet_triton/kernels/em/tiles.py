"""Tile sizes of the EM kernels by GPU architecture and shape.

Times of an H200 (benchmarks/results/h200/tiles.csv) chose the tiles of 64 bases on ``sm_90`` in
half precision, and of the block's small products the rows, columns and channels of a step, but not
the chains. No other tiles were chosen by timing.

The tiles of ``sm_80`` fit the 99 KB of shared memory that every NVIDIA GPU from Ampere on has, so
they serve all GPUs without a table of their own. The tiles of ``gfx942`` fit AMD's 64 KB.
"""

import functools
from collections.abc import Iterator
from typing import Any

from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.tile import ARCHS, FP32_PRECISIONS, Tile

MAX_BASES = 256
MAX_CHANNELS = 2048
MIN_SPLIT, MAX_SPLITS = 256, 48

# Backends that compute E and M step in one pass over the features, and into how many ranges of
# positions they cut an image at most. Many ranges give each of a GPU's multiprocessors work of a
# single image; few ranges write less, and a batch has enough of them.
ONE_PASS = {"one-pass-128": 128, "one-pass-16": 16}
ONE_PASS_CHANNELS, ONE_PASS_BASES = 512, 64  # exactly so many channels, and at most so many bases

# Block sizes, warps and pipeline stages, by architecture and by how products are computed: "half"
# is bf16 and fp16, the others are the precisions of fp32. These are the largest candidates that
# compile without spilling in every use (bench/ahead_of_time/gates.py). Only E step, M step and
# epilogue of 64 bases on sm_90 in half precision have the fastest of the tiles that were timed.
_Sizes = tuple[int, ...]

# BLOCK_N, BLOCK_C, warps, stages for K padded to 64, 128 and 256.
_PADDED_BASES = (64, 128, 256)
_BY_BASES: dict[str, dict[tuple[str, str], tuple[_Sizes, ...]]] = {
    "em_e_step": {
        ("sm_80", "half"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        ("sm_80", "ieee"): ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 3)),
        ("sm_80", "tf32x3"): ((128, 32, 8, 3), (64, 32, 8, 3), (32, 32, 8, 2)),
        ("sm_80", "tf32"): ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        ("sm_90", "half"): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
        ("sm_90", "ieee"): ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 3)),
        ("sm_90", "tf32x3"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 3)),
        ("sm_90", "tf32"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ("sm_100", "half"): ((128, 64, 8, 3), (64, 64, 8, 3), (128, 64, 8, 3)),
        ("sm_100", "ieee"): ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 3)),
        ("sm_100", "tf32x3"): ((128, 64, 8, 3), (128, 64, 8, 3)),  # and see _has_tf32x3
        ("sm_100", "tf32"): ((64, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ("gfx942", "half"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
        ("gfx942", "ieee"): ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)),
        ("gfx942", "tf32"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    },
    "em_m_step": {
        ("sm_80", "half"): ((64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 3)),
        ("sm_80", "ieee"): ((32, 64, 4, 3), (32, 64, 8, 3), (32, 32, 8, 3)),
        ("sm_80", "tf32x3"): ((32, 128, 8, 3), (32, 64, 8, 3), (32, 32, 8, 2)),
        ("sm_80", "tf32"): ((32, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        ("sm_90", "half"): ((64, 64, 4, 4), (64, 128, 8, 3), (64, 64, 8, 3)),
        ("sm_90", "ieee"): ((32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 8, 3)),
        ("sm_90", "tf32x3"): ((64, 64, 8, 3), (64, 64, 8, 3), (32, 64, 8, 3)),
        ("sm_90", "tf32"): ((64, 128, 4, 3), (64, 64, 8, 3), (64, 128, 8, 2)),
        ("sm_100", "half"): ((64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 3)),
        ("sm_100", "ieee"): ((32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 8, 3)),
        ("sm_100", "tf32x3"): ((64, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
        ("sm_100", "tf32"): ((64, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
        ("gfx942", "half"): ((64, 128, 4, 2), (64, 128, 4, 2), (64, 128, 4, 2)),
        ("gfx942", "ieee"): ((32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
        ("gfx942", "tf32"): ((64, 128, 4, 2), (64, 128, 4, 2), (64, 64, 4, 1)),
    },
}

# BLOCK_N, warps and 1, as Gluon makes no pipeline: two such tiles and the bases fill the shared
# memory. No GPU has timed it.
_STAGE: dict[tuple[str, str], _Sizes] = {("sm_90", "half"): (64, 8, 1)}

# BLOCK_N, BLOCK_O, BLOCK_C, buffers of weights, buffers of outputs, warps and 1: they fill the
# shared memory, too. No GPU has timed it.
_OUTPUT: dict[tuple[str, str], _Sizes] = {("sm_90", "half"): (128, 256, 64, 3, 3, 8, 1)}

# BLOCK_N, BLOCK_C, warps, stages for any K, taken 64 bases at a time.
_RECONSTRUCT: dict[tuple[str, str], _Sizes] = {
    ("sm_80", "half"): (128, 128, 8, 3),
    ("sm_80", "ieee"): (64, 64, 8, 1),
    ("sm_80", "tf32x3"): (64, 32, 8, 3),
    ("sm_80", "tf32"): (128, 128, 8, 2),
    ("sm_90", "half"): (128, 128, 8, 3),
    ("sm_90", "ieee"): (64, 64, 8, 3),
    ("sm_90", "tf32x3"): (128, 64, 8, 3),
    ("sm_90", "tf32"): (128, 128, 8, 3),
    ("sm_100", "half"): (128, 128, 8, 3),
    ("sm_100", "ieee"): (64, 64, 8, 3),
    ("sm_100", "tf32x3"): (128, 128, 8, 3),
    ("sm_100", "tf32"): (128, 128, 8, 3),
    ("gfx942", "half"): (128, 128, 8, 2),
    ("gfx942", "ieee"): (64, 64, 8, 1),
    ("gfx942", "tf32"): (64, 64, 8, 1),
}

# BLOCK_N, BLOCK_O, BLOCK_C, warps, stages for any K, taken 64 bases at a time.
_EPILOGUE: dict[tuple[str, str], _Sizes] = {
    ("sm_80", "half"): (64, 128, 64, 8, 3),
    ("sm_80", "ieee"): (64, 64, 16, 8, 2),
    ("sm_80", "tf32x3"): (64, 64, 16, 8, 1),
    ("sm_80", "tf32"): (64, 128, 32, 8, 1),
    ("sm_90", "half"): (64, 128, 64, 8, 3),
    ("sm_90", "ieee"): (64, 64, 16, 8, 2),
    ("sm_90", "tf32x3"): (128, 64, 32, 8, 1),
    ("sm_90", "tf32"): (128, 64, 64, 8, 3),
    ("sm_100", "half"): (64, 64, 64, 8, 3),
    ("sm_100", "ieee"): (64, 64, 32, 8, 3),
    ("sm_100", "tf32x3"): (64, 64, 64, 8, 1),
    ("sm_100", "tf32"): (128, 64, 64, 8, 3),
    ("gfx942", "half"): (128, 128, 32, 8, 2),
    ("gfx942", "ieee"): (64, 64, 32, 8, 1),
    ("gfx942", "tf32"): (64, 64, 32, 8, 1),
}
# Replacements for channels-last features and K up to 64, where Z stays in registers.
_EPILOGUE_OF_FEW: dict[tuple[str, str], _Sizes] = {
    ("sm_80", "tf32x3"): (64, 64, 32, 8, 1),
    ("sm_90", "half"): (128, 128, 32, 4, 4),
    ("sm_90", "ieee"): (64, 64, 16, 8, 3),
    ("sm_90", "tf32x3"): (128, 64, 64, 8, 1),
    ("sm_100", "half"): (128, 128, 64, 8, 3),
}

# The block's small float32 products: BLOCK_M, BLOCK_O, BLOCK_C, CHAINS (see ``folding.chains``),
# warps, stages. The tiles are small, because the 64 bases of one image would else keep few
# multiprocessors busy. Without tensor cores one chain is enough, and needs fewer registers.
_PROJECTION = (16, 32, 16, 4, 4, 3)
_PROJECTION_OF = {
    ("sm_80", "ieee"): (16, 32, 64, 1, 4, 3),
    ("sm_90", "ieee"): (16, 32, 64, 1, 4, 3),
    ("sm_100", "ieee"): (16, 32, 64, 1, 4, 2),  # three stages spill in Triton 3.9
    # A multiprocessor has one program, so nothing else runs while it waits for loads: with one
    # chain an H200 took 2.7 µs less with three stages than with two. Four are not timed.
    ("sm_90", "half"): (16, 32, 16, 4, 4, 4),
}

# em_reduce and em_normalise run one program per base. The table says how many partial sums
# em_reduce loads at a time, by C padded to a power of two.
_BY_CHANNELS = {64: 64, 128: 32, 256: 16, 512: 8, 1024: 2, 2048: 2}


def _has_tf32x3(kernel: str, arch: str, num_bases: int) -> bool:
    """AMD has no tf32x3. Triton 3.6 cannot compile an E step of more than 128 bases for sm_100."""
    return arch != "gfx942" and (kernel, arch, num_bases > 128) != ("em_e_step", "sm_100", True)


@functools.cache
def tile(
    kernel: str,
    arch: str,
    dtype: str,
    channels: int,
    num_bases: int,
    channels_last: bool = True,
    precision: str = "ieee",
) -> Tile:
    """The configuration of a kernel for C channels and K bases.

    ``precision`` matters for fp32 only. ieee replaces tf32x3 unless ``_has_tf32x3``.
    """
    if dtype != "fp32" or (precision == "tf32x3" and not _has_tf32x3(kernel, arch, num_bases)):
        precision = "ieee"
    products = (arch, precision if dtype == "fp32" else "half")
    meta: dict[str, Any] = {"PRECISION": precision}
    if kernel in _BY_BASES:
        block_k = pad_bases(num_bases)
        row = _BY_BASES[kernel][products][_PADDED_BASES.index(block_k)]
        meta["BLOCK_N"], meta["BLOCK_C"], *launch = row
        meta["BLOCK_K"] = block_k
    elif kernel == "em_stage":
        meta = {"BLOCK_K": ONE_PASS_BASES}
        meta["BLOCK_N"], *launch = _STAGE[products]
    elif kernel == "em_output":
        names = "BLOCK_N", "BLOCK_O", "BLOCK_C", "BUFFERS", "OUTS"
        *sizes, num_warps, stages = _OUTPUT[products]
        meta = {**dict(zip(names, sizes, strict=True)), "BLOCK_K": ONE_PASS_BASES}
        launch = [num_warps, stages]
    elif kernel == "em_reconstruct":
        meta["BLOCK_N"], meta["BLOCK_C"], *launch = _RECONSTRUCT[products]
        meta["BLOCK_K"] = 64
    elif kernel == "em_epilogue":
        few = channels_last and num_bases <= 64
        row = (_EPILOGUE | _EPILOGUE_OF_FEW if few else _EPILOGUE)[products]
        meta["BLOCK_N"], meta["BLOCK_O"], meta["BLOCK_C"], *launch = row
        meta["BLOCK_K"] = 64
    elif kernel in ("em_project", "em_fold"):
        row = _PROJECTION_OF.get(products, _PROJECTION)
        meta["BLOCK_M"], meta["BLOCK_O"], meta["BLOCK_C"], meta["CHAINS"], *launch = row
        exact = arch == "gfx942" or products[1] == "ieee"
        meta["PRECISION"] = "ieee" if exact else "tf32x3"
    else:
        block_c = max(64, 1 << (channels - 1).bit_length())
        meta, launch = {"BLOCK_C": block_c}, [4, 1]
        if kernel == "em_reduce":
            meta |= {"BLOCK_S": _BY_CHANNELS[block_c], "BLOCK_T": 256}
            launch = [8, 1]
    return Tile(kernel, arch, dtype, meta, *launch)


def pad_bases(num_bases: int) -> int:
    """K rounded up to a size that has tiles."""
    return next(size for size in _PADDED_BASES if size >= num_bases)


def split_length(num_positions: int) -> int:
    """How many positions an M-step program sums. N alone decides, so the batch changes no bit."""
    length = MIN_SPLIT
    while length * MAX_SPLITS < num_positions:
        length *= 2
    return length


def range_length(num_positions: int, ranges: int, block_n: int) -> int:
    """How many positions a program of ``em_stage`` takes, given the most ranges of an image."""
    blocks = -(-num_positions // block_n)
    return -(-blocks // ranges) * block_n


def has_one_pass(arch: str, dtype: str) -> bool:
    """Whether ``em_stage`` and ``em_output`` have tiles."""
    return dtype != "fp32" and (arch, "half") in _STAGE


def _shipped() -> Iterator[Tile]:
    of_products = (*_BY_BASES, "em_reconstruct", "em_epilogue", "em_project", "em_fold")
    for arch in ARCHS:
        for dtype in DTYPES:
            for precision in FP32_PRECISIONS if dtype == "fp32" else ("ieee",):
                for kernel in of_products:
                    for num_bases in _PADDED_BASES:
                        for channels_last in (True, False):
                            yield tile(kernel, arch, dtype, 64, num_bases, channels_last, precision)
            if has_one_pass(arch, dtype):
                for kernel in ("em_stage", "em_output"):
                    yield tile(kernel, arch, dtype, ONE_PASS_CHANNELS, ONE_PASS_BASES)
            for kernel in ("em_reduce", "em_normalise"):
                for channels in _BY_CHANNELS:
                    yield tile(kernel, arch, dtype, channels, 64)


def _distinct(found: Iterator[Tile]) -> tuple[Tile, ...]:
    return tuple({repr(tile): tile for tile in found}.values())


SHIPPED = _distinct(_shipped())
