"""The resampling kernels compile for every target, without spills and within shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "compiled_resample.py"
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes


@pytest.fixture(scope="module")
def rows(pytestconfig):
    """What compiles; Triton's cache lies in pytest's, so that a second run is quick."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(pytestconfig.cache.mkdir("triton"))
    output = subprocess.check_output([sys.executable, SCRIPT], env=environment, text=True)
    return json.loads(output)


def test_every_configuration_compiles(rows):
    # three dtypes, two numbers of classes, three ways; and two confusion matrices
    wanted = dict.fromkeys(SHARED, 3 * 2 * 3 + 2)
    assert {arch: sum(row["arch"] == arch for row in rows) for arch in SHARED} == wanted


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack"]] == []


def test_shared_memory_fits(rows):
    assert [row for row in rows if row["shared"] > SHARED[row["arch"]]] == []


def test_labels_of_19_classes_leave_room_for_many_warps(rows):
    limits = {"sm_80": 72, "sm_90": 72, "sm_100": 72, "gfx942": 128}
    ours = [row for row in rows if row["name"].startswith(("single-19", "views-19"))]
    assert len(ours) == 2 * 3 * len(SHARED)
    assert [row for row in ours if row["registers"] > limits[row["arch"]]] == []
