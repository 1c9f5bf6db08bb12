"""The cost model against numbers worked out by hand."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from emanet_triton.bench import cost
from emanet_triton.bench.cost import ConvShape, Cost, Shape
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.tile import Tile

# 2 images of 300 positions, 64 channels, 7 bases: Z is 64 wide, the M step has 2 ranges of 256.
SMALL = Shape(2, 300, channels=64, bases=7, num_stages=2)
FEATS = 2 * 300 * 64 * 2  # 76,800 bytes
Z = 2 * 300 * 64 * 2
PARTIAL = 2 * 2 * 7 * 64 * 4  # 7,168 bytes
COLSUM = 2 * 7 * 3 * 4  # 3 tiles of 128 positions
PRODUCT = 2 * 2 * 300 * 64 * 64  # FLOPs of one product with Z


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    """Tiles of 128 positions and 32 output channels, whatever the tables say."""
    tile = Tile("any", "sm_90", "bf16", {"BLOCK_N": 128, "BLOCK_O": 32}, 4, 3)
    monkeypatch.setattr(tiles, "tile", lambda *shape, **options: tile)


def test_costs_add():
    assert Cost(1, 2) + Cost(30, 40) == Cost(31, 42)
    assert sum([Cost(1, 2), Cost(3, 4)], Cost()) == Cost(4, 6)


def test_the_slower_resource_sets_the_floor():
    assert Cost(6_000, 10).floor_seconds(bandwidth=3e3, flop_rate=10) == 2
    assert Cost(6_000, 50).floor_seconds(bandwidth=3e3, flop_rate=10) == 5


def test_launches_of_em_attention():
    first, new = 7 * 64 * 2, 2 * 7 * 64 * 2  # bases of one image, then of two
    want = [
        ("em_e_step", Cost(FEATS + Z + COLSUM + first, PRODUCT)),
        ("em_m_step", Cost(FEATS + Z + PARTIAL, PRODUCT)),
        ("em_reduce", Cost(PARTIAL + COLSUM + new, 2 * 2 * 7 * 64)),
        ("em_e_step", Cost(FEATS + Z + COLSUM + new, PRODUCT)),
        ("em_m_step", Cost(FEATS + Z + PARTIAL, PRODUCT)),
        ("em_reduce", Cost(PARTIAL + COLSUM + new, 2 * 2 * 7 * 64)),
        ("em_reconstruct", Cost(Z + new + FEATS, PRODUCT)),
    ]
    assert cost.attention_launches(SMALL) == want
    assert want[0][1] == Cost(154_664, 4_915_200)


def test_launches_of_the_block():
    layer = (64 * 64 + 64) * 4  # weight and bias of the mid convolution
    rows = 7  # bases of the one initial set
    fold = Cost(rows * 64 * 4 + layer + rows * 64 * 2 + rows * 4, 2 * rows * 64 * 64)
    sums = 14 * 64 * 4
    mass = 14 * 4
    gram = 65 * 64 * 4
    stage = ["em_e_step", "em_m_step", "em_reduce", "em_project"]
    launches = cost.block_launches(SMALL)
    names = ["em_fold", *stage, *stage, "em_normalise", "em_epilogue"]
    assert [kernel for kernel, _ in launches] == names
    assert fold == Cost(19_356, 57_344)
    assert launches[0][1] == fold + Cost(gram, 2 * 65 * 64 * 64)
    assert launches[1][1] == Cost(FEATS + Z + COLSUM + rows * 64 * 2 + rows * 4, PRODUCT)
    assert launches[3][1] == Cost(PARTIAL + COLSUM + sums + mass, 2 * 2 * 7 * 64)
    # Bases in bf16; of two blocks of channels the squares and the biases, and one size, in fp32.
    folded = 14 * 64 * 2 + 14 * 5 * 4
    read = sums + mass + layer + gram
    assert launches[4][1] == Cost(read + folded, 2 * 2 * 14 * 64 * 64)
    assert launches[5][1] == Cost(FEATS + Z + COLSUM + folded, PRODUCT)  # now of two images
    assert launches[8][1] == Cost(sums + mass + layer + sums, 2 * 14 * 64 * 64)
    assert cost.block_launches(replace(SMALL, num_stages=1))[0][1] == fold
    assert launches[-2][1] == Cost(sums + 14 * 64 * 2)
    # Two blocks of output channels, and so two reconstructions; W2 in bf16, its bias in fp32.
    moved = Z + 14 * 64 * 2 + 64 * 64 * 2 + 64 * 4 + 2 * FEATS
    assert launches[-1][1] == Cost(moved, 2 * PRODUCT + 2 * 2 * 300 * 64 * 64)


def test_launches_with_one_pass(monkeypatch):
    blocks = {"BLOCK_N": 64, "BLOCK_O": 32, "BLOCK_C": 16}
    tile = Tile("em_stage", "sm_90", "bf16", blocks, 8, 1)
    monkeypatch.setattr(tiles, "tile", lambda *shape, **options: tile)
    # Ranges of 192 and 108 positions; Z is written after the second stage.
    one_pass = replace(SMALL, ranges=2)
    first, new, colsum = 7 * 64 * 2, 2 * 7 * 64 * 2, 2 * 7 * 2 * 4
    reduce = "em_reduce", Cost(PARTIAL + colsum + new, 2 * 2 * 7 * 64)
    assert cost.attention_launches(one_pass) == [
        ("em_stage", Cost(FEATS + first + PARTIAL + colsum, 2 * PRODUCT)),
        reduce,
        ("em_stage", Cost(FEATS + new + PARTIAL + colsum + Z, 2 * PRODUCT)),
        reduce,
        ("em_reconstruct", Cost(Z + new + FEATS, PRODUCT)),
    ]
    stage = ["em_stage", "em_reduce", "em_project"]
    launches = cost.block_launches(one_pass)
    names = [kernel for kernel, _ in launches]
    assert names == ["em_fold", *stage, *stage, "em_normalise", "em_output"]
    # Two blocks of outputs, and so two reconstructions; and a quarter of one before all steps.
    moved = Z + new + 64 * 64 * 2 + 64 * 4 + 2 * FEATS
    assert launches[-1][1] == Cost(moved, 9 * PRODUCT // 4 + 2 * 2 * 300 * 64 * 64)
    # With five tiles of 64, two ranges have three and two tiles, five ranges one tile each.
    [(_, many), *_] = cost.attention_launches(replace(SMALL, ranges=5))
    assert many.bytes == FEATS + first + 5 * (PARTIAL + colsum) // 2


def test_fp32_takes_twice_the_bytes():
    wide = Shape(2, 300, channels=64, bases=7, dtype="fp32")
    [(_, moved)] = cost.attention_launches(wide)[-1:]
    assert moved.bytes == 2 * (Z + 2 * 7 * 64 * 2 + FEATS)


@pytest.mark.parametrize("batch", [1, 8])
def test_floors_of_the_design_notes(batch):
    """At N=32768 the block needs 59 µs of memory and 40 µs of arithmetic for every image."""
    floor = cost.block_floor(Shape(batch, 32768))
    assert floor.bytes / 3.0e12 == pytest.approx(batch * 59e-6, rel=0.01)
    assert floor.flops / 798e12 == pytest.approx(batch * 40e-6, rel=0.01)
    assert floor.floor_seconds(3.0e12, 798e12) == floor.bytes / 3.0e12


def test_floor_of_em_attention():
    floor = cost.attention_floor(SMALL)
    assert floor == Cost(3 * FEATS + 2 * (2 * 300 * 7 * 2), 5 * 2 * 2 * 300 * 64 * 7)


def test_launches_never_beat_the_floor():
    for shape in (SMALL, Shape(1, 9409), Shape(8, 131072, dtype="fp32")):
        for launches, floor in (
            (cost.attention_launches(shape), cost.attention_floor(shape)),
            (cost.block_launches(shape), cost.block_floor(shape)),
        ):
            whole = sum((c for _, c in launches), Cost())
            assert whole.bytes >= floor.bytes
            assert whole.flops >= floor.flops


def test_flops_and_bytes_of_a_convolution():
    half = torch.float16
    layer = ConvShape(1, 512, 128, 256, 256, 3, 1, 2, half, torch.float32, half, True)
    pixels = 128 * 256
    assert layer.pixels == pixels
    assert layer.flops == 2 * pixels * 256 * 512 * 9
    assert layer.bytes == 2 * 512 * pixels + 2 * 256 * 512 * 9 + 4 * 256 + (4 + 2) * 256 * pixels


def test_strides_round_the_size_of_a_convolution_up():
    layer = ConvShape(2, 3, 5, 8, 4, 1, 2, 1, torch.float32, None, torch.float32, False)
    assert layer.pixels == 2 * 3 * 4
    assert layer.flops == 2 * 24 * 4 * 3
    assert layer.bytes == 4 * (2 * 3 * 40 + 12 + 4 + 24 * 4)


def test_command_prints_launches_beside_the_floor():
    command = [sys.executable, "-m", "emanet_triton.bench.cost", "--batch", "8"]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert lines[-1].split() == ["floor", "1409.3", "257.70", "469.8"]
    assert sum(line.split()[0] == "em_e_step" for line in lines) == 2


@pytest.mark.parametrize("backend", tiles.ONE_PASS)
def test_command_prints_one_pass(backend, capsys, monkeypatch):
    monkeypatch.undo()  # the shipped tiles
    monkeypatch.setattr(sys, "argv", ["cost", "--backend", backend])
    assert cost.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines if line[0] == "em_stage"] == ["3", "3"]
    moved = {"one-pass-128": "286.6", "one-pass-16": "198.4"}  # docs/kernels.md names them
    assert ["all", "launches", "12", moved[backend]] in [line[:4] for line in lines]


def test_one_pass_needs_half_precision(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cost", "--backend", "one-pass-16", "--dtype", "fp32"])
    assert cost.main() == 2
    message = "--backend one-pass-16: needs half precision, not --dtype fp32"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--batch", "0"), ("--positions", "-1"), ("--bandwidth", "0"), ("--flop-rate", "nan")],
)
def test_figures_that_are_not_above_zero_are_refused(capsys, monkeypatch, option, value):
    monkeypatch.setattr(sys, "argv", ["cost", f"{option}={value}"])
    assert cost.main() == 2
    assert f"argument {option}: expected a" in capsys.readouterr().err
