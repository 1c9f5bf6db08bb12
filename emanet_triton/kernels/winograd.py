"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), for the CPU.

A tile of 4 x 4 outputs comes from 6 x 6 products of transformed pixels and transformed weights,
summed over the channels, in place of 144 (Lavin and Gray, CVPR 2016). All is PyTorch: small matrix
products transform ``TILES`` tiles at once, and between them is one batched matrix product. A
dilation of d is d * d convolutions, each of every d-th row and column. On a CPU each thread takes
whole blocks of tiles.

Transformed weights are four times as large as the weights. They are made anew at every call, for
``CHANNELS_BYTES`` of input channels at a time: kept, they would be most of a network's memory.
Of so few pixels that this would not pay, the convolution is PyTorch's.
"""

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from emanet_triton.kernels.conv_providers import torch_conv
from emanet_triton.kernels.threads import for_each, num_threads

TILE = 4
SIZE = TILE + 2
TILES = 256  # enough rows for the matrix products, few enough for their operands to stay in cache
CHANNELS_BYTES = 2048  # of a pixel
WEIGHTS = 2**14  # transformed at once
FEW_PIXELS = {4: 1024, 2: 2048}  # by bytes of a number: where both ways take about as long

# Outputs of one axis = OUTPUT @ ((FILTER @ weights) * (INPUT @ pixels)): Toom-Cook with the points
# 0, 1, -1, 1/2, -2 and infinity, which round a third less than the usual 0, 1, -1, 2, -2 do.
INPUT = [
    [1, -1.5, -2, 1.5, 1, 0],
    [0, -1, 0.5, 2.5, 1, 0],
    [0, 1, -2.5, 0.5, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 0.5, -1, -0.5, 1, 0],
    [0, 1, -1.5, -2, 1.5, 1],
]
FILTER = [
    [1, 0, 0],
    [1 / 3, 1 / 3, 1 / 3],
    [-1 / 3, 1 / 3, -1 / 3],
    [-16 / 15, -8 / 15, -4 / 15],
    [1 / 15, -2 / 15, 4 / 15],
    [0, 0, 1],
]
OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 0.5, -2, 0],
    [0, 1, 1, 0.25, 4, 0],
    [0, 1, -1, 0.125, -8, 1],
]
_OF_THREAD = threading.local()
ONES = SIZE + 1  # the product of the point 1 in both axes, which every output takes once


def pack_weight(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] → the same in memory of the order [columns, rows, O, C].

    The operator reads weights so, and packs an unpacked weight anew at every call.
    """
    return weight.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)


@torch.no_grad()
def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    dilation: int = 1,
    relu: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Convolve with a 3x3 kernel and stride 1, add bias and residual, apply ReLU.

    The transforms, bias, residual and ReLU are computed in float32, the products in the dtype of
    ``x``. In half precision the transformed operands are rounded once more than a plain
    convolution's are: on noise the error is about five times as large.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16. Channels-last memory needs no copy.
        weight: [O, C, 3, 3], from ``pack_weight``, in that dtype.
        bias: [O], floating point.
        residual: [B, O, H, W], floating point.
        dilation: at least 1, which is the padding, too.
        relu: whether negative values become zero.
        out_dtype: the dtype of ``x`` unless given.

    Returns:
        [B, O, H, W], channels-last. No gradient flows through it.

    Raises:
        ValueError: a shape, the weight's dtype or the dilation is not as above.
    """
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, C, H, W] and not empty, got {list(x.shape)}")
    if weight.dim() != 4 or list(weight.shape[1:]) != [x.shape[1], 3, 3]:
        raise ValueError(f"weight must be [O, {x.shape[1]}, 3, 3], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    if list(bias.shape) != [weight.shape[0]]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    wanted = [x.shape[0], weight.shape[0], *x.shape[2:]]
    if residual is not None and list(residual.shape) != wanted:
        raise ValueError(f"residual must be {wanted}, got {list(residual.shape)}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    return torch.ops.emanet_triton.winograd_conv(
        x, weight, bias, residual, dilation, relu, out_dtype or x.dtype
    )


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    dilation: int,
    relu: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if x.shape[0] * x.shape[2] * x.shape[3] < FEW_PIXELS[x.element_size()]:
        return torch_conv(x, weight, bias, residual, 1, dilation, relu, out_dtype, "ieee")
    out = _fake(x, weight, bias, residual, dilation, relu, out_dtype)
    most = CHANNELS_BYTES // x.element_size()
    pieces = x.split(most, 1)
    taps = weight.permute(3, 2, 0, 1).flatten(0, 1).split(most, 2)  # each [9, O, C]
    rows = list(_tile_rows(x.shape[0], x.shape[2], dilation))
    threads = min(num_threads(x.device), len(rows))
    across = _tiles_across(x, dilation)
    blocks = _even_blocks(rows, max(1, TILES // threads // across), threads)

    channels, outputs = pieces[0].shape[1], len(bias)
    most_rows = len(max(blocks, key=len))
    tiles = most_rows * across
    sizes = [SIZE**2 * n for n in (tiles * channels, tiles * outputs)]
    weights_size = SIZE**2 * channels * outputs
    memory = _memory(x, weights_size + threads * sum(sizes))
    transformed, *of_threads = memory.split([weights_size, *[sum(sizes)] * threads])

    total = out
    if len(pieces) > 1 and out_dtype != torch.float32:
        total = torch.empty_like(out, dtype=torch.float32)
    addend = residual
    for i, (piece, piece_taps) in enumerate(zip(pieces, taps, strict=True)):
        last = i == len(pieces) - 1
        matrices = _part(transformed, SIZE**2, outputs, piece.shape[1])
        _transform_weight(piece_taps, matrices)
        target = out if last else total
        memories = iter(of_threads)

        def make_run(
            piece: Tensor = piece,
            matrices: Tensor = matrices,
            bias: Tensor | None = None if i else bias,
            write_to: tuple = (target, addend, dilation, relu and last, most_rows),
            memories: Iterator[Tensor] = memories,
        ) -> Callable[[list], None]:
            read = _InputTransform(piece, dilation, most_rows)
            write = _OutputTransform(*write_to)
            own = next(memories).split(sizes)
            return lambda block: _convolve(read, matrices, bias, write, block, *own)

        for_each(make_run, blocks, x.device)
        addend = target
    return out


def _convolve(
    read: "_InputTransform",
    matrices: Tensor,
    bias: Tensor | None,
    write: "_OutputTransform",
    block: list,
    pixels_memory: Tensor,
    products_memory: Tensor,
) -> None:
    """What is read of a block times transformed weights, [36, O, C], is written."""
    _, outputs, channels = matrices.shape
    shape = SIZE, SIZE, len(block)
    pixels = _part(pixels_memory, *shape, read.tiles_across * channels)
    products = _part(products_memory, *shape, read.tiles_across * outputs)
    read(block, pixels)
    flat = products.view(SIZE**2, -1, outputs)
    torch.bmm(pixels.view(SIZE**2, -1, channels), matrices.mT, out=flat)
    if bias is not None:
        flat[ONES] += bias
    write(products, block)


def _memory(like: Tensor, size: int) -> Tensor:
    """Memory for so many elements, on Linux a mapping of its own in pages as large as there are.

    A thread keeps it for its next call: to map it anew takes a tenth of a convolution, and the C
    library would keep some of it as holes that fit nothing else.
    """
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(size)
    size_in_bytes = size * like.element_size()
    kept = getattr(_OF_THREAD, "memory", None)
    if kept is None or len(kept) < size_in_bytes:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        kept = _OF_THREAD.memory = mmap.mmap(-1, size_in_bytes, flags=flags)
        with contextlib.suppress(OSError):  # a kernel without large pages
            kept.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(kept, dtype=like.dtype)[:size]


def _part(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _transform_weight(taps: Tensor, out: Tensor) -> None:
    """[9, O, C] → [36, O, C], computed in float32."""
    one_axis = torch.tensor(FILTER, dtype=torch.float64, device=taps.device)
    matrix = torch.kron(one_axis, one_axis).float()
    outputs = max(1, WEIGHTS // taps.shape[2])  # at a time, which stay in cache
    parts = list(zip(taps.split(outputs, 1), out.split(outputs, 1), strict=True))

    def transform(part: tuple[Tensor, Tensor]) -> None:
        source, target = part
        _multiply(matrix, source.flatten(1), target.view(SIZE**2, -1))

    for_each(lambda: transform, parts, taps.device)


def _tiles_across(x: Tensor, dilation: int) -> int:
    return -(-x.shape[3] // (TILE * dilation)) * dilation


def _tile_rows(batch: int, height: int, dilation: int) -> Iterator[tuple[int, int]]:
    """(image, first output row) of every row of tiles."""
    for image in range(batch):
        for phase in range(min(dilation, height)):
            for row in range(phase, height, TILE * dilation):
                yield image, row


def _even_blocks(rows: list, most: int, threads: int) -> list[list]:
    """Split into blocks of at most so many each, about equally long, as few for every thread."""
    count = min(-(-len(rows) // (most * threads)) * threads, len(rows))
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]


class _InputTransform:
    """The pixels of up to R rows of tiles → the tiles' transformed pixels."""

    def __init__(self, x: Tensor, dilation: int, most_rows: int) -> None:
        self.images, self.dilation = x.permute(0, 2, 3, 1), dilation  # [B, H, W, C]
        channels, width = x.shape[1], x.shape[3]
        self.tiles_across = _tiles_across(x, dilation)
        across = self.tiles_across // dilation
        self.matrix = x.new_tensor(INPUT, dtype=torch.float32)
        # [6, R, columns, C]: transformed along the rows; zero where the padding is.
        slab = self.matrix.new_zeros(SIZE, most_rows, (across * TILE + 2) * dilation, channels)
        self.inside = slab[:, :, dilation : dilation + width].flatten(2)
        # [6 columns, 6 rows, R, tiles across, dilation, C], a view and its copy
        phases = slab.unflatten(2, (-1, dilation))
        self.overlapping = phases.unfold(2, SIZE, TILE).permute(5, 0, 1, 2, 3, 4)
        self.tiles = torch.empty_like(self.overlapping, memory_format=torch.contiguous_format)

    def __call__(self, rows: list[tuple[int, int]], out: Tensor) -> None:
        """Fill ``out``, [6 columns, 6 rows, rows of tiles, tiles * C]."""
        for i, (image, first) in enumerate(rows):
            above = first < self.dilation  # the first of the six rows lies above the image
            six = slice(
                first if above else first - self.dilation,
                first + (SIZE - 1) * self.dilation,
                self.dilation,
            )
            pixels = self.images[image, six].flatten(1)
            _multiply(self.matrix[:, above : above + len(pixels)], pixels, self.inside[:, i])
        tiles = self.tiles[:, :, : len(rows)]
        tiles.copy_(self.overlapping[:, :, : len(rows)])
        for tile_row, transformed in zip(tiles.unbind(1), out.unbind(1), strict=True):
            _multiply(self.matrix, tile_row.flatten(1), transformed.flatten(1))


class _OutputTransform:
    """The products of up to R rows of tiles → rows of the output, with what is added and ReLU."""

    def __init__(
        self, out: Tensor, addend: Tensor | None, dilation: int, relu: bool, most_rows: int
    ) -> None:
        self.out, self.dilation, self.relu = out.permute(0, 2, 3, 1), dilation, relu
        self.addend = None if addend is None else addend.permute(0, 2, 3, 1)
        channels, self.width = out.shape[1], out.shape[3]
        across = _tiles_across(out, dilation) // dilation
        self.matrix = out.new_tensor(OUTPUT, dtype=torch.float32)
        # [6, R, columns, C]: transformed along the columns; beyond the width to be left out.
        self.slab = self.matrix.new_empty(SIZE, most_rows, across, TILE, dilation, channels)
        self.columns = self.matrix.new_empty(self.slab[0].numel())

    def __call__(self, products: Tensor, rows: list[tuple[int, int]]) -> None:
        """Read ``products``, [6 columns, 6 rows, rows of tiles, tiles * O]."""
        slab = self.slab[:, : len(rows)]
        _, count, across, _, dilation, channels = slab.shape
        columns = _part(self.columns, TILE, count, across, dilation, channels)
        in_place = columns.permute(1, 2, 0, 3, 4)
        for tile_row, transformed in zip(products.unbind(1), slab, strict=True):
            _multiply(self.matrix, tile_row.flatten(1), columns.flatten(1))
            transformed.copy_(in_place)
        inside = slab.flatten(2, 4)[:, :, : self.width].flatten(2)
        for i, (image, first) in enumerate(rows):
            self._write(inside[:, i], image, first)

    def _write(self, inside: Tensor, image: int, first: int) -> None:
        rows = slice(first, first + TILE * self.dilation, self.dilation)
        out = self.out[image, rows].flatten(1)
        whole = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        matrix = self.matrix[: len(out)]
        if self.addend is None:
            torch.mm(matrix, inside, out=whole)
        else:
            torch.addmm(self.addend[image, rows].flatten(1).float(), matrix, inside, out=whole)
        if self.relu:
            whole.relu_()
        if whole is not out:
            out.copy_(whole)


def _multiply(matrix: Tensor, source: Tensor, out: Tensor) -> None:
    """out = matrix @ source, computed in float32 whatever the dtypes of source and out."""
    if source.dtype == out.dtype == torch.float32:
        torch.mm(matrix, source, out=out)
    else:
        out.copy_(matrix @ source.float())


def _fake(x, weight, bias, residual, dilation, relu, out_dtype) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


_LIBRARY = torch.library.Library("emanet_triton", "FRAGMENT")
_LIBRARY.define(
    "winograd_conv(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int dilation, "
    "bool relu, ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("winograd_conv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("emanet_triton::winograd_conv", _fake, lib=_LIBRARY)
