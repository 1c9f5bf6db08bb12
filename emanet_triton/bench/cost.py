"""Bytes and FLOPs of a convolution and of the EM kernels, and the least an EM operator needs.

    python -m emanet_triton.bench.cost --batch 8 --positions 32768

A launch counts the bytes of each tensor once, as if programs that read the same data found it in
the cache. It counts all products that it computes, also of the padding of K and recomputed ones.
"""

import argparse
from collections import Counter
from dataclasses import dataclass

import torch

from emanet_triton.bench.options import positive
from emanet_triton.command import Parser, answer, count, program, run, say
from emanet_triton.errors import InputError
from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.em import tiles

FLOAT32 = 4


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory, and floating-point operations (two for a multiply-add)."""

    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def floor_seconds(self, bandwidth: float, flop_rate: float) -> float:
        """Seconds that memory (bytes/s) or arithmetic (FLOP/s) alone takes, whichever is slower."""
        return max(self.bytes / bandwidth, self.flops / flop_rate)


@dataclass(frozen=True)
class Shape:
    """Features [B, N, C] of a dtype, bases [1, C, K], and what computes them.

    ``ranges`` is that of ``attention.Stages``: None for a kernel each for E and M step.
    """

    batch: int
    positions: int
    channels: int = 512
    bases: int = 64
    num_stages: int = 3
    dtype: str = "bf16"
    precision: str = "tf32x3"
    arch: str = "sm_90"
    ranges: int | None = None

    @property
    def element(self) -> int:
        """Bytes of one number of the features' dtype."""
        return FLOAT32 if self.dtype == "fp32" else 2

    @property
    def feats(self) -> int:
        """Bytes of the features."""
        return self.batch * self.positions * self.channels * self.element

    @property
    def padded(self) -> int:
        """K with the padding that Z has in memory."""
        return tiles.pad_bases(self.bases)

    @property
    def responsibilities(self) -> int:
        """Bytes of Z, [B, N, padded K]."""
        return self.batch * self.positions * self.padded * self.element

    def numbers(self, images: int) -> int:
        """How many numbers the bases of some images have."""
        return images * self.bases * self.channels

    def product(self, width: int) -> int:
        """FLOPs of [B, N, C] by [C, width]."""
        return 2 * self.batch * self.positions * self.channels * width

    def blocks(self, kernel: str, block: str, size: int) -> int:
        """Blocks that a kernel cuts ``size`` into."""
        return -(-size // self.block(kernel, block))

    def block(self, kernel: str, block: str) -> int:
        """A block size of a kernel."""
        shape = {"num_bases": self.bases, "precision": self.precision}
        return tiles.tile(kernel, self.arch, self.dtype, self.channels, **shape).meta[block]


@dataclass(frozen=True)
class ConvShape:
    """One convolution with bias, residual and ReLU.

    Attributes:
        batch, channels, height, width: of the input.
        outputs: channels of the output.
        kernel, stride, dilation: of the convolution, padded to keep the size at stride 1.
        dtype: of the input and the weight.
        residual: dtype of the residual, if there is one.
        out_dtype: of the output.
        relu: whether the output goes through a ReLU.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    dtype: torch.dtype
    residual: torch.dtype | None
    out_dtype: torch.dtype
    relu: bool

    @property
    def pixels(self) -> int:
        """Pixels of the output."""
        height, width = ((size - 1) // self.stride + 1 for size in (self.height, self.width))
        return self.batch * height * width

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products; bias, residual and ReLU not counted."""
        return 2 * self.pixels * self.outputs * self.channels * self.kernel**2

    @property
    def bytes(self) -> int:
        """Bytes moved if every tensor is read or written once; the bias is taken as float32."""
        inputs = self.batch * self.channels * self.height * self.width
        weights = self.outputs * self.channels * self.kernel**2
        per_output = self.out_dtype.itemsize + (self.residual.itemsize if self.residual else 0)
        return (
            (inputs + weights) * self.dtype.itemsize
            + 4 * self.outputs
            + self.pixels * self.outputs * per_output
        )


def attention_launches(shape: Shape) -> list[tuple[str, Cost]]:
    """The launches of ``em_attention`` in their order."""
    new = shape.numbers(shape.batch) * shape.element
    launches = []
    for stage in range(shape.num_stages):
        old = shape.numbers(shape.batch if stage else 1) * shape.element
        launches += _em_step(shape, old, new, stage == shape.num_stages - 1)
    moved = shape.responsibilities + new + shape.feats
    return [*launches, ("em_reconstruct", Cost(moved, shape.product(shape.padded)))]


def block_launches(shape: Shape) -> list[tuple[str, Cost]]:
    """The launches of ``em_attention_block`` in their order."""
    gram = FLOAT32 * (shape.channels + 1) * shape.channels
    gram_flops = 2 * (shape.channels + 1) * shape.channels**2
    rows = shape.batch * shape.bases
    sums = FLOAT32 * (shape.numbers(shape.batch) + rows)
    parts = shape.blocks("em_project", "BLOCK_O", shape.channels)
    folded = shape.numbers(1) * shape.element + FLOAT32 * shape.bases
    made = Cost(folded)
    if shape.num_stages > 1:
        made += Cost(gram, gram_flops)
    launches = [("em_fold", _small_product(shape, 1) + made)]
    for _ in range(shape.num_stages - 1):
        launches += _em_step(shape, folded, sums, False)
        folded = shape.numbers(shape.batch) * shape.element + FLOAT32 * rows * (2 * parts + 1)
        product = _small_product(shape, shape.batch)
        read = Cost(FLOAT32 * rows + gram, product.flops)  # the mass and G, and its product
        launches.append(("em_project", product + read + Cost(folded)))
    last = _small_product(shape, shape.batch) + Cost(sums)
    launches += [*_em_step(shape, folded, sums, True), ("em_project", last)]
    bases = shape.numbers(shape.batch) * shape.element
    launches.append(("em_normalise", Cost(FLOAT32 * shape.numbers(shape.batch) + bases)))
    weight = shape.element * shape.channels**2 + FLOAT32 * shape.channels
    moved = shape.responsibilities + bases + weight + 2 * shape.feats
    kernel = "em_epilogue" if shape.ranges is None else "em_output"
    recomputed = shape.blocks(kernel, "BLOCK_O", shape.channels) * shape.product(shape.padded)
    if kernel == "em_output":  # the last step's reconstruction is for a step that does not follow
        recomputed += shape.product(shape.padded) // shape.blocks(kernel, "BLOCK_C", shape.channels)
    cost = Cost(moved, recomputed + shape.product(shape.channels))
    return [*launches, (kernel, cost)]


def _em_step(shape: Shape, old: int, new: int, is_last: bool) -> list[tuple[str, Cost]]:
    """E step, M step and its reduction, given the bytes of the bases read and written."""
    rows = shape.batch * shape.bases
    flops = shape.product(shape.padded)
    if shape.ranges is None:
        tiles_of_image = shape.blocks("em_e_step", "BLOCK_N", shape.positions)
        split = tiles.split_length(shape.positions)
    else:
        block_n = shape.block("em_stage", "BLOCK_N")
        split = tiles.range_length(shape.positions, shape.ranges, block_n)
        tiles_of_image = -(-shape.positions // split)
    colsum = FLOAT32 * rows * tiles_of_image
    partial = -(-shape.positions // split) * shape.numbers(shape.batch)
    reduce = "em_reduce", Cost(FLOAT32 * partial + colsum + new, partial)
    if shape.ranges is not None:
        written = FLOAT32 * partial + colsum + (shape.responsibilities if is_last else 0)
        return [("em_stage", Cost(shape.feats + old + written, 2 * flops)), reduce]
    moved = shape.feats + shape.responsibilities
    return [
        ("em_e_step", Cost(moved + old + colsum, flops)),
        ("em_m_step", Cost(moved + FLOAT32 * partial, flops)),
        reduce,
    ]


def _small_product(shape: Shape, images: int) -> Cost:
    """Bases of some images times the mid convolution, in float32: bytes read, and FLOPs."""
    layer = shape.channels**2 + shape.channels
    read = FLOAT32 * (shape.numbers(images) + layer)
    return Cost(read, 2 * shape.numbers(images) * shape.channels)


def attention_floor(shape: Shape) -> Cost:
    """Least cost of ``em_attention``: features once a stage, Z written and read, the output."""
    return _em_floor(shape) + Cost(shape.feats, shape.product(shape.bases))


def block_floor(shape: Shape) -> Cost:
    """Least cost of the block: as ``attention_floor``, and features once more for the residual."""
    products = shape.product(shape.bases) + shape.product(shape.channels)
    return _em_floor(shape) + Cost(2 * shape.feats, products)


def _em_floor(shape: Shape) -> Cost:
    responsibilities = shape.batch * shape.positions * shape.bases * shape.element
    moved = shape.num_stages * shape.feats + 2 * responsibilities
    return Cost(moved, 2 * shape.num_stages * shape.product(shape.bases))


def main() -> int:
    """Print the costs of the EM operators; returns the exit code, 2 for bad arguments."""
    return answer(lambda: _main(_options()))


def _options() -> argparse.Namespace:
    parser = Parser(prog=program("bench.cost"), description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=count, default=1)
    parser.add_argument("--positions", type=count, default=32768)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--backend", choices=("triton", *tiles.ONE_PASS), default="triton",
        help="one kernel each for E and M step (default), or the kernels of the one-pass backends",
    )  # fmt: skip
    parser.add_argument("--bandwidth", type=positive, default=3e12, help="bytes/s (default: H100)")
    parser.add_argument("--flop-rate", type=positive, default=798e12, help="FLOP/s (default: H100)")
    return parser.parse_args()


def _main(options: argparse.Namespace) -> int:
    ranges = tiles.ONE_PASS.get(options.backend)
    if ranges and options.dtype == "fp32":
        raise InputError(f"--backend {options.backend}: needs half precision, not --dtype fp32")
    shape = Shape(options.batch, options.positions, dtype=options.dtype, ranges=ranges)
    for name, launches, floor in (
        ("em_attention", attention_launches(shape), attention_floor(shape)),
        ("em_attention_block", block_launches(shape), block_floor(shape)),
    ):
        say(f"{name:20} launches        MB    GFLOP  floor µs")
        counts = Counter(kernel for kernel, _ in launches)
        whole = sum((cost for _, cost in launches), Cost())
        for kernel in counts:
            cost = sum((cost for k, cost in launches if k == kernel), Cost())
            _print_row(kernel, counts[kernel], cost, options)
        _print_row("all launches", len(launches), whole, options)
        _print_row("floor", "", floor, options)
    return 0


def _print_row(name: str, launches: int | str, cost: Cost, options: argparse.Namespace) -> None:
    floor = 1e6 * cost.floor_seconds(options.bandwidth, options.flop_rate)
    columns = f"{cost.bytes / 1e6:9.1f} {cost.flops / 1e9:8.2f} {floor:9.1f}"
    say(f"  {name:18} {launches:8} {columns}")


if __name__ == "__main__":
    run(main)
