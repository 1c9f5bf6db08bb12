"""3x3 convolutions with a quarter of the multiplications: Winograd's F(4x4, 3x3), for the CPU.

For each input channel a tile of 4 x 4 outputs needs 6 x 6 products of transformed pixels and
transformed weights, in place of 144 products (Lavin and Gray, CVPR 2016). PyTorch computes
everything: small matrix products transform the pixels of ``TILES`` tiles, one batched matrix
product sums over the channels, and small matrix products make the outputs. A convolution of
dilation d is computed as d * d convolutions, each of every d-th row and column. On a CPU each
thread takes whole blocks of tiles.

In float32 oneDNN computes the products where it is much faster than PyTorch's own
(``onednn_beats_mkl``).

In bfloat16 the transforms multiply bfloat16, too: oneDNN sums in float32, and each result is
rounded once. bfloat16 holds the numbers of the matrices for pixels and for products exactly, and
each number of the matrix for weights as a sum of two, to 16 bits. So each tap is multiplied twice.

Transformed weights are four times as large as the weights. To keep them would take most of a
network's memory, so every call computes them anew, for ``CHANNELS_BYTES`` of input channels at a
time. For images of few pixels PyTorch's convolution is faster, and runs instead in any batch.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from emanet_triton.kernels import flops
from emanet_triton.kernels.checks import check_at_least, check_dtype, check_layout, check_shape
from emanet_triton.kernels.conv.eager import torch_conv
from emanet_triton.kernels.conv.onednn import compute_dtype
from emanet_triton.kernels.conv.scratch import Scratch, allocate, view
from emanet_triton.kernels.products import onednn_beats_mkl, onednn_linear
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.threads import for_each, num_threads

TILE = 4
SIZE = TILE + 2
TILES = 128  # enough rows for the matrix products, few enough for their operands to stay in cache
CHANNELS_BYTES = 2048  # input channels of one pixel that are transformed at once
WEIGHTS = 2**14  # weights of one tap that are transformed at once
SMALL_PIXELS = 2**14  # for more pixels, no memory is kept for the next call
FEW_PIXELS = {4: 1024, 2: 2048}  # of an image, by bytes of a number: PyTorch's is faster with fewer

# Outputs of one axis = OUTPUT @ ((FILTER @ weights) * (INPUT @ pixels)): Toom-Cook with the points
# 0, 1, -1, 1/2, -2 and infinity. Their rounding errors are a third smaller than with the usual
# points 0, 1, -1, 2 and -2.
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
ONES = SIZE + 1  # index of the product at point 1 of both axes: every output adds it once


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight [O, C, 3, 3] to memory in the order [rows, columns, O, C].

    The operator reads this layout, and copies a weight of another layout at every call.
    """
    return weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


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

    The products and the bias are computed in ``compute_dtype``, the residual and its sum in
    float32. In bfloat16 the transformed operands and the products, to one of which the bias is
    added, are rounded once more than in a plain convolution: for random numbers the error is 10 to
    12 times as large. For images of few pixels the convolution is rounded to ``compute_dtype``
    before the residual is added.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16. Channels-last memory needs no copy.
        weight: [O, C, 3, 3], in the dtype of ``x``, from ``pack_weight``.
        bias: [O], floating point.
        residual: [B, O, H, W], floating point.
        dilation: at least 1; also the padding.
        relu: whether negative values become zero.
        out_dtype: the dtype of ``x`` unless given.

    Returns:
        [B, O, H, W], channels-last. No gradient flows through it.

    Raises:
        ValueError: a shape, the weight's dtype or the dilation is not as above.
    """
    check_layout("x", x, "B, C, H, W")
    if weight.dim() != 4 or list(weight.shape[1:]) != [x.shape[1], 3, 3]:
        raise ValueError(f"weight must be [O, {x.shape[1]}, 3, 3], got {list(weight.shape)}")
    check_dtype("weight", weight.dtype, (x.dtype,), like="x")
    check_shape("bias", bias, [weight.shape[0]])
    if residual is not None:
        check_shape("residual", residual, [x.shape[0], weight.shape[0], *x.shape[2:]])
    check_at_least("dilation", dilation, 1)
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
    dtype = compute_dtype(x.dtype)  # of the products
    if x.shape[2] * x.shape[3] < FEW_PIXELS[dtype.itemsize]:
        operands = x.to(dtype), weight.to(dtype), bias, residual
        return torch_conv(*operands, 1, dilation, relu, out_dtype, "ieee")
    out = _fake(x, weight, bias, residual, dilation, relu, out_dtype)
    most = CHANNELS_BYTES // dtype.itemsize
    pieces = x.split(most, 1)
    taps = weight.permute(2, 3, 0, 1).flatten(0, 1).split(most, 2)  # each [9, O, C]
    rows = list(_tile_rows(x.shape[0], x.shape[2], dilation))
    across = _tiles_across(x, dilation)
    threads = num_threads(x.device)
    small = x.shape[0] * x.shape[2] * x.shape[3] <= SMALL_PIXELS
    even = _even_blocks(rows, max(1, TILES // across), threads)
    blocks = [_runs(block, dilation) for block in even]

    channels, outputs = pieces[0].shape[1], len(bias)
    tiles = across * max(sum(count for *_, count in runs) for runs in blocks)
    weights_bytes = SIZE**2 * channels * outputs * dtype.itemsize
    thread_bytes = _scratch_bytes(tiles, channels, outputs, dtype.itemsize)
    memory = allocate(x.device, weights_bytes + threads * sum(thread_bytes), keep=small)
    weights_memory, *scratch = memory.split([weights_bytes, *thread_bytes * threads])
    of_threads = list(zip(scratch[::2], scratch[1::2], strict=True))

    transform_weight = functools.partial(_transform_weight, _filter(dtype, x.device))
    total = out
    if len(pieces) > 1 and out_dtype != torch.float32:
        total = torch.empty_like(out, dtype=torch.float32)
    addend = residual
    for i, (piece, piece_taps) in enumerate(zip(pieces, taps, strict=True)):
        last = i == len(pieces) - 1
        matrices = view(weights_memory, (SIZE**2, outputs, piece.shape[1]), dtype)
        at_once = min(tiles, -(-WEIGHTS // piece.shape[1]))
        parts = zip(piece_taps.split(at_once, 1), matrices.split(at_once, 1), strict=True)
        _for_each(transform_weight, list(parts), of_threads, x.device)
        convolve = _Convolution(
            piece, matrices, None if i else bias, addend, out if last else total, dilation,
            relu and last,
        )  # fmt: skip
        _for_each(convolve, blocks, of_threads, x.device)
        addend = total
    return out


def _scratch_bytes(tiles: int, channels: int, outputs: int, itemsize: int) -> list[int]:
    """Bytes of the two parts of a thread's memory, in the order of their use.

    Both have to hold the transformed pixels. The first has to hold the products in float32, and the
    second the products with one axis transformed. The first also holds taps, which need less: they
    are of at most as many outputs as there are tiles.
    """
    pixels = SIZE**2 * channels * itemsize
    first, second = max(pixels, SIZE**2 * outputs * 4), max(pixels, TILE * SIZE * outputs * 4)
    return [tiles * first, tiles * second]


def _for_each(
    step: Callable,
    items: Sequence[object],
    memories: list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    """Call step(scratch, item) for every item, in threads that have one of the memories each."""
    free = deque(memories)

    def make_run() -> Callable[[object], None]:
        memory = free.popleft()
        return lambda item: step(Scratch(memory), item)

    for_each(make_run, items, device)


class _Convolution:
    """Computes the outputs of a block of rows of tiles.

    A run is (image, first output row, number of rows of tiles). With a dilation of d a tile has
    every d-th row and column. The order of tiles is [rows of tiles, across, phases of the columns].
    """

    def __init__(
        self,
        x: Tensor,
        matrices: Tensor,
        bias: Tensor | None,
        addend: Tensor | None,
        out: Tensor,
        dilation: int,
        relu: bool,
    ) -> None:
        self.images, self.out = x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)  # [B, H, W, C]
        self.addend = None if addend is None else addend.permute(0, 2, 3, 1)
        self.matrices, self.bias, self.dilation, self.relu = matrices, bias, dilation, relu
        self.across = _tiles_across(x, dilation) // dilation
        dtype = matrices.dtype
        self.input = x.new_tensor(INPUT, dtype=dtype)
        as_it_is = addend is None and out.dtype == dtype
        self.output = x.new_tensor(OUTPUT, dtype=dtype if as_it_is else torch.float32)

    def __call__(self, scratch: Scratch, runs: list[tuple[int, int, int]]) -> None:
        self._write(self._products(self._read(runs, scratch), scratch), runs, scratch)

    def _read(self, runs: list[tuple[int, int, int]], scratch: Scratch) -> Tensor:
        """Transformed pixels, [36, tiles, C] in the dtype of the products."""
        channels, d, width = self.images.shape[3], self.dilation, self.images.shape[2]
        most, rows = max(count for *_, count in runs), sum(count for *_, count in runs)
        columns = self.across * TILE + 2
        padded = scratch.take(most * TILE + 2, columns * d, channels, dtype=self.input.dtype)
        tiles = scratch.take(SIZE, SIZE, rows, self.across, d, channels, dtype=self.input.dtype)
        of_runs = tiles.split([count for *_, count in runs], 2)
        for (image, first, count), part in zip(runs, of_runs, strict=True):
            above = first < d  # the first of its rows lies above the image
            stop = first + TILE * count * d + 1
            pixels = self.images[image, first if above else first - d : stop : d]
            padded.zero_()
            padded[above : above + len(pixels), d : d + width] = pixels
            sixes = padded.unflatten(1, (columns, d)).unfold(0, SIZE, TILE)[:count]
            part.copy_(sixes.unfold(1, SIZE, TILE).permute(4, 5, 0, 1, 2, 3))

        return _transform(self.input, tiles.flatten(2), scratch).unflatten(1, (-1, channels))

    def _products(self, pixels: Tensor, scratch: Scratch) -> Tensor:
        """[36, tiles, C] → sums over the channels, [36, tiles, O] in the dtype of ``output``."""
        shape = *pixels.shape[:2], self.matrices.shape[1]
        products = scratch.take(*shape, dtype=pixels.dtype)
        if pixels.dtype == torch.float32 and onednn_beats_mkl(pixels.device):
            for product, x, matrix in zip(products, pixels, self.matrices, strict=True):
                product.copy_(onednn_linear(x, matrix))
        else:
            torch.bmm(pixels, self.matrices.mT, out=products)
        if self.bias is not None:
            products[ONES] += self.bias
        return scratch.cast(products, self.output.dtype)

    def _write(self, products: Tensor, runs: list[tuple[int, int, int]], scratch: Scratch) -> None:
        """Sums [36, tiles, O] → rows of the output, with the addend and ReLU."""
        d, outputs, width = self.dilation, products.shape[2], self.out.shape[2]
        block = _transform(self.output, products.flatten(1).unflatten(0, (SIZE, SIZE)), scratch)
        tiles = block.view(TILE, TILE, -1, self.across, d, outputs)
        lines = scratch.copy(tiles.permute(2, 0, 3, 1, 4, 5), products.dtype)
        lines = lines.flatten(0, 1).flatten(1, 3)  # [rows, columns, O]

        of_runs = lines.split([TILE * count for *_, count in runs])
        for (image, first, count), part in zip(runs, of_runs, strict=True):
            rows = slice(first, first + TILE * count * d, d)
            out = self.out[image, rows]
            part = part[: len(out), :width]
            if self.addend is not None:
                part += self.addend[image, rows]
            out.copy_(part.relu_() if self.relu else part)


def _transform(matrix: Tensor, tiles: Tensor, scratch: Scratch) -> Tensor:
    """Multiply both axes of the tiles, [n, n, K], by a matrix [m, n] → [m * m, K].

    In bfloat16 one larger product is faster, and it rounds once.
    """
    m, n = matrix.shape
    if matrix.dtype == torch.bfloat16:
        out = scratch.take(m * m, tiles.shape[2], dtype=matrix.dtype)
        return torch.mm(torch.kron(matrix, matrix), tiles.flatten(0, 1), out=out)
    half = scratch.take(m, n, tiles.shape[2])
    torch.mm(matrix, tiles.flatten(1), out=half.flatten(1))
    out = scratch.take(m, m, tiles.shape[2])
    return torch.bmm(matrix.expand(m, -1, -1), half, out=out).flatten(0, 1)


def _filter(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix that transforms weights, [36, 9]; in bfloat16 its two parts, [36, 18]."""
    one_axis = torch.tensor(FILTER, dtype=torch.float64, device=device)
    exact = torch.kron(one_axis, one_axis)
    matrix = exact.to(dtype)
    return torch.cat([matrix, (exact - matrix).to(dtype)], 1) if dtype == torch.bfloat16 else matrix


def _transform_weight(matrix: Tensor, scratch: Scratch, part: tuple[Tensor, Tensor]) -> None:
    """Transform the taps [9, O, C] of a part into its second tensor, [36, O, C]."""
    taps, out = part
    terms = matrix.shape[1] // len(taps)
    if terms > 1 or taps.dtype != matrix.dtype or not taps[0].is_contiguous():
        copies = scratch.take(terms, *taps.shape, dtype=matrix.dtype)
        taps = copies.copy_(taps).flatten(0, 1)
    torch.mm(matrix, taps.flatten(1), out=out.flatten(1))


def _tiles_across(x: Tensor, dilation: int) -> int:
    return -(-x.shape[3] // (TILE * dilation)) * dilation


def _tile_rows(batch: int, height: int, dilation: int) -> Iterator[tuple[int, int]]:
    """(image, first output row) of every row of tiles."""
    for image in range(batch):
        for phase in range(min(dilation, height)):
            for row in range(phase, height, TILE * dilation):
                yield image, row


def _even_blocks(rows: list, most: int, threads: int) -> list[list]:
    """Split into blocks of at most ``most`` rows, about equally long, equally many per thread."""
    count = min(-(-len(rows) // (most * threads)) * threads, len(rows))
    return [rows[i * len(rows) // count : (i + 1) * len(rows) // count] for i in range(count)]


def _runs(rows: list[tuple[int, int]], dilation: int) -> list[tuple[int, int, int]]:
    """Join rows of tiles that follow one another: (image, first output row, count)."""
    runs: list[tuple[int, int, int]] = []
    for image, row in rows:
        if runs:
            before, first, count = runs[-1]
            if (image, row) == (before, first + count * TILE * dilation):
                runs[-1] = before, first, count + 1
                continue
        runs.append((image, row, 1))
    return runs


def _fake(x, weight, bias, residual, dilation, relu, out_dtype) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


register(__name__, Operator("winograd_conv", _run, _fake, flops=flops.first_convolution))
