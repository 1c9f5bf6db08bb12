"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), for the CPU.

A tile of 4 x 4 outputs comes from 6 x 6 products of transformed pixels and transformed weights,
summed over the channels, in place of 144 (Lavin and Gray, CVPR 2016). All is PyTorch: transforms
are small matrix products of one row of tiles, which stays in cache, and the products a batched
matrix product of ``TILES`` tiles at once. A dilation of d is d * d convolutions, each of every
d-th row and column.

Transformed weights are four times as large as the weights. They are made anew at every call, for
``CHANNELS_BYTES`` of input channels at a time: kept, they would be most of a network's memory.
Of so few pixels that this would not pay, the convolution is PyTorch's.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from emanet_triton.kernels.conv_providers import torch_conv

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
    blocks = _even_blocks(rows, max(1, TILES // _tiles_across(x, dilation)))

    channels, outputs = pieces[0].shape[1], len(bias)
    tiles = len(max(blocks, key=len)) * _tiles_across(x, dilation)
    sizes = [SIZE**2 * n for n in (channels * outputs, tiles * channels, tiles * outputs)]
    transformed, *memory = _new_memory(x, sum(sizes)).split(sizes)

    total = out
    if len(pieces) > 1 and out_dtype != torch.float32:
        total = torch.empty_like(out, dtype=torch.float32)
    addend = residual
    for i, (piece, piece_taps) in enumerate(zip(pieces, taps, strict=True)):
        last = i == len(pieces) - 1
        matrices = _part(transformed, SIZE**2, outputs, piece.shape[1])
        _transform_weight(piece_taps, matrices)
        target = out if last else total
        read = _InputTransform(piece, dilation)
        write = _OutputTransform(target, addend, dilation, relu and last)
        _convolve(read, matrices, None if i else bias, write, blocks, *memory)
        addend = target
    return out


def _convolve(
    read: "_InputTransform",
    matrices: Tensor,
    bias: Tensor | None,
    write: "_OutputTransform",
    blocks: list[list],
    pixels_memory: Tensor,
    products_memory: Tensor,
) -> None:
    """What is read times transformed weights, [36, O, C], is written, block after block."""
    _, outputs, channels = matrices.shape
    for block in blocks:
        shape = SIZE, SIZE, len(block)
        pixels = _part(pixels_memory, *shape, read.tiles_across * channels)
        products = _part(products_memory, *shape, read.tiles_across * outputs)
        for i, row in enumerate(block):
            read(row, pixels[:, :, i])
        flat = products.view(SIZE**2, -1, outputs)
        torch.bmm(pixels.view(SIZE**2, -1, channels), matrices.mT, out=flat)
        if bias is not None:
            flat[ONES] += bias
        for i, row in enumerate(block):
            write(products[:, :, i], row)


def _new_memory(like: Tensor, size: int) -> Tensor:
    """Memory for so many elements, on Linux a mapping of its own in pages as large as there are.

    It goes back to the system when it is freed. The C library would keep some of it as holes that
    fit nothing else, and map the rest in pages of 4 KB, which takes a tenth of a convolution.
    """
    if like.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, size * like.element_size(), flags=flags)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=like.dtype)


def _part(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _transform_weight(taps: Tensor, out: Tensor) -> None:
    """[9, O, C] → [36, O, C], computed in float32."""
    one_axis = torch.tensor(FILTER, dtype=torch.float64, device=taps.device)
    matrix = torch.kron(one_axis, one_axis).float()
    outputs = max(1, WEIGHTS // taps.shape[2])  # at a time, which stay in cache
    for source, target in zip(taps.split(outputs, 1), out.split(outputs, 1), strict=True):
        _multiply(matrix, source.flatten(1), target.view(SIZE**2, -1))


def _tiles_across(x: Tensor, dilation: int) -> int:
    return -(-x.shape[3] // (TILE * dilation)) * dilation


def _tile_rows(batch: int, height: int, dilation: int) -> Iterator[tuple[int, int]]:
    """(image, first output row) of every row of tiles."""
    for image in range(batch):
        for phase in range(min(dilation, height)):
            for row in range(phase, height, TILE * dilation):
                yield image, row


def _even_blocks(rows: list, most: int) -> list[list]:
    """Split into as few blocks as hold at most so many each, of about equal length."""
    count = -(-len(rows) // most)
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]


class _InputTransform:
    """The pixels of a row of tiles → the tiles' transformed pixels."""

    def __init__(self, x: Tensor, dilation: int) -> None:
        self.images, self.dilation = x.permute(0, 2, 3, 1), dilation  # [B, H, W, C]
        channels, width = x.shape[1], x.shape[3]
        self.tiles_across = _tiles_across(x, dilation)
        across = self.tiles_across // dilation
        self.matrix = x.new_tensor(INPUT, dtype=torch.float32)
        # [6, columns, C]: transformed along the rows; zero where the padding is.
        slab = self.matrix.new_zeros(SIZE, (across * TILE + 2) * dilation, channels)
        self.inside = slab[:, dilation : dilation + width].flatten(1)
        # [6 columns, 6 rows, tiles across, dilation, C], a view and its copy
        phases = slab.unflatten(1, (-1, dilation))
        self.overlapping = phases.unfold(1, SIZE, TILE).permute(4, 0, 1, 2, 3)
        self.tiles = torch.empty_like(self.overlapping, memory_format=torch.contiguous_format)
        self.tile_rows = self.tiles.flatten(2).unbind(1)

    def __call__(self, row: tuple[int, int], out: Tensor) -> None:
        """Fill ``out``, [6 columns, 6 rows, tiles * C]."""
        image, first = row
        above = first < self.dilation  # the first of the six rows lies above the image
        rows = slice(
            first if above else first - self.dilation,
            first + (SIZE - 1) * self.dilation,
            self.dilation,
        )
        pixels = self.images[image, rows].flatten(1)
        _multiply(self.matrix[:, above : above + len(pixels)], pixels, self.inside)
        self.tiles.copy_(self.overlapping)
        for tile_row, transformed in zip(self.tile_rows, out.unbind(1), strict=True):
            _multiply(self.matrix, tile_row, transformed)


class _OutputTransform:
    """The products of a row of tiles → rows of the output, with what is added and ReLU."""

    def __init__(self, out: Tensor, addend: Tensor | None, dilation: int, relu: bool) -> None:
        self.out, self.dilation, self.relu = out.permute(0, 2, 3, 1), dilation, relu
        self.addend = None if addend is None else addend.permute(0, 2, 3, 1)
        channels, width = out.shape[1], out.shape[3]
        across = _tiles_across(out, dilation) // dilation
        self.matrix = out.new_tensor(OUTPUT, dtype=torch.float32)
        columns = self.matrix.new_empty(TILE, across, dilation, channels)
        self.columns, self.columns_in_place = columns.flatten(1), columns.transpose(0, 1)
        # [6, columns, C]: transformed along the columns; beyond the width to be left out.
        slab = self.matrix.new_empty(SIZE, across, TILE, dilation, channels)
        self.slab = slab.unbind(0)
        self.inside = slab.flatten(1, 3)[:, :width].flatten(1)

    def __call__(self, products: Tensor, row: tuple[int, int]) -> None:
        """Read ``products``, [6 columns, 6 rows, tiles * O]."""
        for tile_row, transformed in zip(products.unbind(1), self.slab, strict=True):
            _multiply(self.matrix, tile_row, self.columns)
            transformed.copy_(self.columns_in_place)
        image, first = row
        rows = slice(first, first + TILE * self.dilation, self.dilation)
        out = self.out[image, rows].flatten(1)
        whole = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        matrix = self.matrix[: len(out)]
        if self.addend is None:
            torch.mm(matrix, self.inside, out=whole)
        else:
            torch.addmm(self.addend[image, rows].flatten(1).float(), matrix, self.inside, out=whole)
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
