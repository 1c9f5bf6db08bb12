"""Every shipped configuration, compiled for its target and held to the gates and the table."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from emanet_triton.kernels import compiled, tiles

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compiled.csv"
COMMAND = (sys.executable, "-m", "emanet_triton.kernels.compiled")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_key(rows):
    return {tuple(row[name] for name in compiled.KEY): row for row in rows}


def tiles_of(rows):
    return {(row["kernel"], row["target"], row["dtype"], row["configuration"]) for row in rows}


def shipped_tiles():
    return {
        (t.kernel, t.arch, t.dtype, compiled.configuration(t.meta, t.num_warps, t.num_stages))
        for t in tiles.SHIPPED
    }


@pytest.fixture(scope="session")
def rows(pytestconfig, tmp_path_factory):
    """What compiles now; Triton's cache lies in pytest's, so that a second run is quick."""
    path = tmp_path_factory.mktemp("compiled") / "rows.csv"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    command = (*COMMAND, "--shipped-only", "--write", str(path))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return read(path)


def test_every_shipped_configuration_compiles(rows):
    assert tiles_of(rows) == shipped_tiles()


def test_gates(rows):
    assert compiled.problems(rows) == []


def test_the_table_holds_every_shipped_configuration_and_passes_the_gates():
    table = read(TABLE)
    assert tiles_of(table) == shipped_tiles()
    assert compiled.problems(table) == []


def test_the_table_is_what_compiles_now(rows):
    table = by_key(read(TABLE))
    versions = {row["triton"] for row in table.values()}
    if versions != {triton.__version__}:
        pytest.skip(f"the table is of Triton {versions}, this is {triton.__version__}: gates only")
    assert {key: table.get(key) for key in by_key(rows)} == by_key(rows)


def row(**changes):
    values = ("em_e_step", "sm_90", "bf16", "BLOCK_N=128 PRECISION=ieee", "", "64", "0", "73728")
    return dict(zip(compiled.COLUMNS, (*values, "HGMMA", "32", "3.9"), strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": "8"}, "8 bytes of stack"),
        ({"shared": "232449"}, "232449 bytes of shared memory, over 232448"),
        ({"target": "sm_80", "shared": "166913"}, "over 166912"),
        ({"target": "gfx942", "shared": "65537"}, "over 65536"),
        ({"count": "0"}, "0 tensor-core instructions"),
        ({"count": "0", "dtype": "fp32", "configuration": "PRECISION=tf32x3"}, "0 tensor-core"),
        ({"count": "0", "dtype": "fp32", "target": "gfx942"}, "0 tensor-core instructions"),
        ({"dtype": "fp32"}, "32 tensor-core instructions"),
    ],
    ids=["stack", "sm_90", "sm_80", "gfx942", "half", "tf32x3", "fp32_mfma", "fp32_in_full"],
)
def test_a_gate_that_fails(changes, message):
    [problem] = compiled.problems([row(**changes)])
    assert message in problem


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shared": "232448"},
        {"dtype": "fp32", "count": "0"},
        {"kernel": "em_reduce", "configuration": "BLOCK_S=8", "count": "0"},
    ],
    ids=["half", "all_of_the_memory", "fp32_in_full", "no_product"],
)
def test_gates_that_hold(changes):
    assert compiled.problems([row(**changes)]) == []


def test_nothing_is_compiled_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(COMMAND, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: nothing is compiled while TRITON_INTERPRET is set\n"
