"""Which tile a convolution takes."""

import itertools
import math

import pytest
import torch

from emanet_triton.bench.ahead_of_time.gates import SHARED_LIMITS
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.launch import cdiv

HALF, SINGLE = torch.bfloat16, torch.float32


def test_tiles_are_chosen_by_shape():
    def blocks(channels, outputs, pixels, **options):
        tile = conv_tiles.tile("conv_rows", "sm_90", "bf16", channels, outputs, pixels, **options)
        return tile.meta["BLOCK_O"], tile.meta["BLOCK_C"]

    assert blocks(512, 512, 128 * 256) == (256, 64)
    assert blocks(512, 512, 97 * 97) == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="fp32") == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="bf16") == (256, 64)
    for channels, block in ((64, 64), (256, 64), (512, 128)):
        flat = conv_tiles.tile("conv_rows", "sm_90", "bf16", channels, 512, 128 * 256, flat=True)
        assert (flat.meta["BLOCK_M"], flat.meta["BLOCK_O"]) == (block, 128)
    assert blocks(256, 128, 128 * 256) == (128, 64)
    assert blocks(256, 64, 128 * 256) == (64, 64)
    odd = conv_tiles.tile("conv_pointers", "sm_90", "bf16", 32, 64, 512 * 1024)
    assert odd.meta["BLOCK_C"] == 32
    for outputs, block in ((19, 32), (32, 32), (33, 64), (72, 64)):
        taps = conv_tiles.tile("conv_taps", "sm_90", "bf16", 3, outputs, 512 * 1024)
        assert taps.meta["BLOCK_O"] == block


def test_amd_has_no_tf32x3_and_takes_full_precision():
    for kernel in ("conv_pointers", "conv_taps"):
        tile = conv_tiles.tile(kernel, "gfx942", "fp32", 64, 64, 64, "tf32x3")
        assert tile.meta["PRECISION"] == "ieee"


@pytest.mark.parametrize("out", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("residual", [None, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("outputs", [8, 64, 65, 128, 136, 256, 2048])
@pytest.mark.parametrize("pixels", [1, 97 * 97, 128 * 256])
def test_boxes_fit_and_hold_a_residual(outputs, residual, out, pixels):
    meta = conv_tiles.boxes_tile("bf16", outputs, pixels, residual, out).meta
    assert meta["BUFFERS"] >= 3
    if residual:
        assert meta["OUTS"] == meta["BLOCK_O"] // conv_tiles.SLICE
    step = (conv_tiles.BOX + meta["BLOCK_O"]) * conv_tiles.BOX_CHANNELS * 2
    part = conv_tiles.BOX * conv_tiles.SLICE * out.itemsize
    if residual not in (None, out):
        part += conv_tiles.BOX * conv_tiles.SLICE * residual.itemsize
    assert meta["BUFFERS"] * step + meta["OUTS"] * part < SHARED_LIMITS["sm_90"]


def test_boxes_are_wide_where_a_gpu_is_full():
    def block(outputs, pixels, residual=None):
        return conv_tiles.boxes_tile("bf16", outputs, pixels, residual, HALF).meta["BLOCK_O"]

    assert block(512, 128 * 256) == block(512, 128 * 256, HALF) == 256
    assert block(512, 128 * 256, SINGLE) == block(512, 97 * 97) == block(128, 128 * 256) == 128
    assert block(64, 128 * 256) == 64


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 200])
@pytest.mark.parametrize("sides", [(1, 1), (97, 97), (128, 256), (193, 5)], ids=str)
def test_no_other_box_covers_a_batch_with_fewer(batch, sides):
    sizes = (batch, *sides)

    def count(box):
        return math.prod(map(cdiv, sizes, box))

    found = conv_tiles.box(*sizes)
    assert math.prod(found) == conv_tiles.BOX
    powers = [2**i for i in range(8)]
    others = itertools.product(powers, powers, powers)
    assert count(found) == min(count(o) for o in others if math.prod(o) == conv_tiles.BOX)


def test_boxes_of_the_networks():
    assert conv_tiles.box(1, 1, 128 * 256) == conv_tiles.box(1, 128, 256) == (1, 1, 128)
    assert conv_tiles.box(8, 97, 97) == (8, 4, 4)
