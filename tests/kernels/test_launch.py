"""A tile that does not fit the GPU gives way to a smaller one, which is remembered."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton

from emanet_triton.bench.ahead_of_time.gates import IN_GLUON
from emanet_triton.kernels import launch
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.tile import Tile

pytestmark = pytest.mark.filterwarnings("error")

SMALL_GPU = Path(__file__).parents[1] / "small_gpu.py"
CPU = torch.device("cpu")
TILE = Tile("a_kernel", "sm_90", "bf16", {"BLOCK_N": 64, "BLOCK_C": 32, "PRECISION": "ieee"}, 8, 2)


class Kernel:
    """Counts its launches, and refuses a tile of more than ``most`` numbers and stages."""

    def __init__(self, most):
        self.most = most
        self.launched = []

    def __getitem__(self, grid):
        def run(*_, BLOCK_N, BLOCK_C, num_stages, **__):
            size = BLOCK_N * BLOCK_C * num_stages
            if size > self.most:
                raise triton.OutOfResources(size, self.most, "shared memory")
            self.launched.append((grid, BLOCK_N, BLOCK_C, num_stages))

        return run


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr(launch, "_REPLACEMENTS", {})


@launch.with_fitting_tiles
def operator(kernel):
    """Cuts 128 rows into programs by its tile, as operators do."""
    tile = launch.fitting(TILE, CPU)
    launch.launch(kernel, tile, CPU, launch.cdiv(128, tile.meta["BLOCK_N"]))
    return tile


def test_what_fits_runs_as_it_is():
    kernel = Kernel(4096)
    assert operator(kernel) is TILE
    assert kernel.launched == [((2,), 64, 32, 2)]


def test_the_next_smaller_tile_is_taken_once_and_remembered():
    kernel = Kernel(1024)
    with pytest.warns(UserWarning) as warned:
        tile = operator(kernel)
    assert [str(w.message) for w in warned] == [
        "a_kernel does not fit cpu with its usual tile: shared memory required 4096, available "
        "1024; a smaller, slower tile runs instead"
    ]
    assert (tile.pipeline_stages, tile.meta["BLOCK_N"], tile.meta["BLOCK_C"]) == (1, 32, 32)
    assert operator(kernel) == tile  # a second warning would be an error
    assert kernel.launched == [((4,), 32, 32, 1)] * 2


def test_a_warning_that_is_an_error_does_not_keep_the_tile():
    kernel = Kernel(2048)
    with pytest.raises(UserWarning, match="does not fit cpu"):
        operator(kernel)
    assert operator(kernel).pipeline_stages == 1


def test_threads_replace_tiles_at_the_same_time():
    tiles_ = [Tile(f"kernel {i}", "sm_90", "bf16", TILE.meta, 8, 9) for i in range(200)]
    error = triton.OutOfResources(2, 1, "shared memory")
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with pytest.warns(UserWarning, match="does not fit"), ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda tile: launch._replace(tile, CPU, error), tiles_ * 2))
    finally:
        sys.setswitchinterval(before)
    assert all(launch.fitting(tile, CPU).pipeline_stages == 8 for tile in tiles_)


def test_another_device_keeps_its_tile():
    with pytest.warns(UserWarning, match="does not fit cpu"):
        operator(Kernel(1024))
    assert launch.fitting(TILE, torch.device("cuda:1")) is TILE


def test_where_nothing_fits_the_reason_is_raised():
    with pytest.warns(UserWarning, match="does not fit"), pytest.raises(triton.OutOfResources):
        operator(Kernel(16 * 16 - 1))


def shrink(tile):
    while tile is not None:
        yield tile
        tile = launch.smaller(tile)


@pytest.mark.parametrize("shipped", [tiles.SHIPPED, conv_tiles.SHIPPED], ids=["em", "conv"])
def test_every_tile_of_a_product_shrinks_to_the_smallest(shipped):
    for tile in shipped:
        *_, last = shrink(tile)
        blocks = {last.meta[name] for name in launch.BLOCK_NAMES if name in last.meta}
        if tile.kernel in ("em_reduce", "em_normalise", *IN_GLUON):
            assert last is tile
        else:
            assert blocks == {launch.SMALLEST_BLOCK}
            assert last.pipeline_stages == 1


def test_no_launcher_rounds_up_by_triton():
    """``triton.cdiv`` takes 6 microseconds of each launch; a kernel would use ``tl.cdiv``."""
    files = sorted(Path(launch.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    assert [file.name for file in files if "triton.cdiv(" in file.read_text()] == []


def test_rounding_up():
    assert [launch.cdiv(n, 4) for n in (1, 4, 5)] == [1, 1, 2]


def test_all_operators_run_on_a_gpu_of_little_memory(tmp_path):
    shared = 65_536
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SMALL_GPU), str(shared)],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    launched, warned = json.loads(done.stdout)
    assert set(launched) >= {
        "em_e_step", "em_m_step", "em_epilogue",
        "conv_rows", "conv_pointers", "conv_taps", "conv_expand_reduce",
    }  # fmt: skip
    assert max(max(sizes) for sizes in launched.values()) <= shared
    refused = [message.split()[0] for message in warned]
    assert set(refused) >= {"em_e_step", "conv_rows", "conv_pointers", "conv_expand_reduce"}
    assert len(refused) == len(set(refused))  # each kernel is named once
    assert all(f"available {shared};" in message for message in warned)
