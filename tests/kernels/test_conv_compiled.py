"""Every tile of the convolution kernels compiles for its target into what it is meant to be."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import compiled_convs
import pytest

from emanet_triton.kernels import conv_tiles

# sm_80's tiles also serve NVIDIA GPUs that have no more than this.
SHARED_LIMITS = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(conv_tiles.__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, compiled_convs.__file__],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(row):
    return f"{row['tile']}, {row['uses']}"


def test_every_tile_is_compiled(compiled):
    assert {row["tile"] for row in compiled} == {str(tile) for tile in conv_tiles.SHIPPED}


def test_nothing_spills(compiled):
    assert [(name(row), row["stack"]) for row in compiled if row["stack"]] == []


def test_shared_memory_fits(compiled):
    too_much = [
        (name(row), row["shared"]) for row in compiled if row["shared"] > SHARED_LIMITS[row["arch"]]
    ]
    assert too_much == []


def test_products_use_the_tensor_cores_except_those_of_float32_in_full(compiled):
    wrong = [name(row) for row in compiled if bool(row["products"]) == row["in_full"]]
    assert wrong == []


def test_the_products_of_sm_90_do_not_wait_for_one_another(compiled):
    """Where the assembler serialises them, a wait follows each.

    Two waits there always are: one in the loop, one after it.
    """
    rows = [row for row in compiled if row["arch"] == "sm_90" and not row["in_full"]]
    assert rows
    assert [name(row) for row in rows if row["waits"] > max(2, row["products"] // 2)] == []


def test_tiles_are_chosen_by_shape():
    def blocks(channels, outputs, pixels, **options):
        tile = conv_tiles.tile("conv_rows", "sm_90", "bf16", channels, outputs, pixels, **options)
        return tile.meta["BLOCK_O"], tile.meta["BLOCK_C"]

    assert blocks(512, 512, 128 * 256) == (256, 64)
    assert blocks(512, 512, 97 * 97) == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="fp32") == (128, 64)
    assert blocks(512, 512, 128 * 256, residual="bf16") == (256, 64)
    assert blocks(256, 128, 128 * 256) == (128, 64)
    assert blocks(256, 64, 128 * 256) == (64, 64)
    pointers = functools.partial(conv_tiles.tile, "conv_pointers", "sm_90", "bf16", 512, 512, 9409)
    assert pointers(residual="bf16").meta["BLOCK_C"] == 32
    assert pointers(residual="bf16", taps=1).meta["BLOCK_C"] == 64
    odd = conv_tiles.tile("conv_pointers", "sm_90", "bf16", 3, 32, 512 * 1024)
    assert odd.meta["BLOCK_C"] == 32


def test_amd_has_no_tf32x3_and_takes_full_precision():
    tile = conv_tiles.tile("conv_pointers", "gfx942", "fp32", 64, 64, 64, "tf32x3")
    assert tile.meta["PRECISION"] == "ieee"
