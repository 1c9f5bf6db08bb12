"""Kernels compiled for their targets and held to the gates and the table.

By default each kernel is compiled once in every dtype and precision. If the table has rows of this
Triton, this sample must equal them; so the table speaks for the other tiles. Without such rows, or
with ``COMPILE_EACH=tile`` in the environment, as ``make test-compiled`` sets it, every shipped tile
is compiled.
"""

import itertools
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from triton.runtime.jit import JITFunction

from emanet_triton.bench.ahead_of_time import gates as compiled
from emanet_triton.bench.ahead_of_time.launches import Group
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.device import DTYPES
from emanet_triton.kernels.em import tiles
from emanet_triton.kernels.pool import tiles as pool_tiles

pytestmark = pytest.mark.timeout(1800)  # minutes of compiling, more on a busy machine

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "compiled.csv"
COMMAND = (sys.executable, "-m", "emanet_triton.bench.ahead_of_time.gates")
RESAMPLING = ("resample_kernel", "confusion_kernel")
PIXELS = "normalise_kernel"
REGISTERS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 128}  # labels of 19 classes
# Of Triton in the table: the oldest and the newest supported, and the one that pip takes.
VERSIONS = {"3.6", "3.8", "3.9"}
IN_TABLE = triton.__version__ in {row["triton"] for row in compiled.read_table(TABLE)}
EACH = os.environ.get("COMPILE_EACH", "kernel" if IN_TABLE else "tile")


def by_key(rows):
    return {tuple(row[name] for name in compiled.KEY): row for row in rows}


def tiles_of(rows):
    """Tiles that have a table; the other kernels have the same on all NVIDIA GPUs."""
    return {
        (row["kernel"], row["target"], row["dtype"], row["configuration"])
        for row in rows
        if row["kernel"] not in (*RESAMPLING, PIXELS)
    }


def shipped_tiles():
    return {
        (t.kernel, t.arch, t.dtype, compiled.configuration(t.meta, t.num_warps, t.pipeline_stages))
        for t in (*tiles.SHIPPED, *conv_tiles.SHIPPED, *pool_tiles.SHIPPED)
    }


def kernels_of(tiles):
    """The kernels of some tiles, with their target, dtype and precision of products."""
    return {(*tile[:3], *re.findall(r"PRECISION=\S+", tile[3])) for tile in tiles}


def resampling(rows):
    return [row for row in rows if row["kernel"] in RESAMPLING]


def use(row):
    """A resampling kernel's number of classes and what it computes."""
    constants = row["constants"].split()
    return f"{constants[0]} {constants[-1]}"


@pytest.fixture(scope="session")
def rows(pytestconfig, tmp_path_factory):
    """All rows and failures; Triton's cache is in pytest's, so that a second run is quick."""
    path = tmp_path_factory.mktemp("compiled") / "rows.csv"
    environment = dict(os.environ)
    if cache := getattr(pytestconfig, "cache", None):  # pytest may run without
        environment["TRITON_CACHE_DIR"] = str(cache.mkdir("triton"))
    environment.pop("TRITON_INTERPRET", None)
    command = (*COMMAND, "--each", EACH, "--write", str(path))
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert path.exists(), done.stderr
    return compiled.read_table(path)


def test_every_kernel_compiles_for_every_target_dtype_and_precision(rows):
    assert kernels_of(tiles_of(rows)) == kernels_of(shipped_tiles())


def test_every_shipped_tile_compiles(rows):
    compiled_tiles, wanted = tiles_of(rows), shipped_tiles()
    if EACH == "kernel":
        assert compiled_tiles < wanted
    else:
        assert compiled_tiles == wanted


def test_gates(rows):
    found = compiled.problems(rows)
    if not compiled.is_seen(triton.__version__):
        if found:
            warnings.warn("\n".join(["gates that Triton does not hold:", *found]), stacklevel=1)
        found = compiled.does_not_fit(rows)
    assert found == []


def test_every_use_of_the_resampling_kernels_compiles(rows):
    # Three dtypes with 23 uses of six numbers of classes, or two of 19; and three confusion
    # matrices.
    labels = 3 * (2 if EACH == "kernel" else 23)
    wanted = dict.fromkeys(compiled.TARGETS, labels + 3)
    assert Counter(row["target"] for row in resampling(rows)) == wanted


def test_the_kernel_of_pixels_compiles_for_every_target_and_dtype(rows):
    found = Counter((row["target"], row["dtype"]) for row in rows if row["kernel"] == PIXELS)
    assert found == dict.fromkeys(itertools.product(compiled.TARGETS, DTYPES), 1)


def test_labels_of_19_classes_leave_room_for_many_warps(rows):
    ours = [row for row in resampling(rows) if use(row) == "C=19 single"]
    assert len(ours) == 3 * len(REGISTERS)
    assert [row for row in ours if int(row["registers"]) > REGISTERS[row["target"]]] == []


def test_a_warp_group_computes_no_product_of_expand_reduce_twice():
    """Each of 64 rows of its own: one instruction for 16 summed channels of each product."""
    found = [row for row in compiled.read_table(TABLE) if row["kernel"] == "conv_expand_reduce"]
    found = [row for row in found if row["target"] == "sm_90"]
    assert len(found) == 2 * len(VERSIONS) * len(conv_tiles.EXPAND_REDUCE_CHANNELS)  # of two dtypes
    for row in found:
        tile = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", row["configuration"])}
        assert tile["BLOCK_M"] == 16 * tile["num_warps"]
        assert int(row["count"]) == (tile["P"] + tile["BLOCK_O"]) // 16


def test_a_warp_group_computes_no_product_of_em_stage_twice(rows):
    """E step: an instruction for 16 channels. M step: for 64 channels and 16 positions each."""
    table = [*rows, *compiled.read_table(TABLE)]
    found = [row for row in table if row["kernel"] == "em_stage"]
    assert {row["triton"].rpartition(".")[0] for row in found} >= VERSIONS
    for row in found:
        tile = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", row["configuration"])}
        channels, groups = tiles.ONE_PASS_CHANNELS, tile["num_warps"] // 4
        m_step = channels // 64 // groups * tile["BLOCK_N"] // 16
        assert int(row["count"]) == channels // 16 + m_step
        assert int(row["waits"]) == 2


def test_em_output_has_five_products_and_four_waits(rows):
    """Two products of 64 channels in each of two steps, and one before the first step."""
    found = [row for row in (*rows, *compiled.read_table(TABLE)) if row["kernel"] == "em_output"]
    assert {row["triton"].rpartition(".")[0] for row in found} >= VERSIONS
    for row in found:
        assert int(row["count"]) == 5 * 64 // 16
        assert int(row["waits"]) == 4  # each product with the bases, and the end of a block


def test_a_warp_group_computes_no_product_of_conv_boxes_twice(rows):
    """An instruction for 16 of the 64 channels of a step, whatever the number of outputs."""
    found = [row for row in (*rows, *compiled.read_table(TABLE)) if row["kernel"] == "conv_boxes"]
    assert {row["triton"].rpartition(".")[0] for row in found} >= VERSIONS
    for row in found:
        assert int(row["count"]) == conv_tiles.BOX_CHANNELS // 16
        assert int(row["waits"]) == 2


def test_the_table_holds_every_shipped_configuration_and_passes_the_gates():
    table = compiled.read_table(TABLE)
    versions = {row["triton"].rpartition(".")[0] for row in table}
    assert versions == VERSIONS
    for version in versions:
        rows = [row for row in table if row["triton"].startswith(version)]
        assert tiles_of(rows) == shipped_tiles()
    assert compiled.problems(table) == []


def test_the_table_is_what_compiles_now(rows):
    if not IN_TABLE:
        pytest.skip(
            f"the table has no rows of Triton {triton.__version__}: only test_gates judges what "
            "compiled"
        )
    table = by_key(compiled.read_table(TABLE))
    assert {key: table.get(key) for key in by_key(rows)} == by_key(rows)


def row(**changes):
    values = ("em_e_step", "sm_90", "bf16", "BLOCK_N=128 PRECISION=ieee", "", "64", "0", "73728")
    values += "HGMMA", "32", "0", "16", "16", "3.9"
    return dict(zip(compiled.COLUMNS, values, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": "8"}, "8 bytes of stack"),
        ({"shared": "232449"}, "232449 bytes of shared memory, over 232448"),
        ({"target": "sm_80", "shared": "101377"}, "over 101376"),
        ({"target": "gfx942", "shared": "65537"}, "over 65536"),
        ({"count": "0"}, "0 tensor-core instructions"),
        ({"count": "0", "dtype": "fp32", "configuration": "PRECISION=tf32x3"}, "0 tensor-core"),
        ({"count": "0", "target": "gfx942", "shared": "0", "dtype": "fp32"}, "0 tensor-core"),
        ({"dtype": "fp32"}, "32 tensor-core instructions"),
        ({"kernel": "conv_rows", "waits": "17"}, "17 waits for 32 products"),
        (
            {"kernel": "conv_expand_reduce", "configuration": "BLOCK_M=64", "count": "0"},
            "0 tensor-core",
        ),
        ({"load": "2"}, "loads of 2 bytes, not 16"),
    ],
    ids=[
        "stack",
        "sm_90",
        "sm_80",
        "gfx942",
        "half",
        "tf32x3",
        "fp32_mfma",
        "fp32_in_full",
        "waits",
        "expand_reduce",
        "loads",
    ],
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
        {"kernel": "conv_rows", "waits": "16"},
        {"load": "4", "full_load": "4"},
        {"load": "2", "constants": "C=512 NCHW"},
        {"kernel": "conv_taps", "load": "2"},
        {
            "kernel": "em_m_step",
            "dtype": "fp32",
            "configuration": "PRECISION=tf32 num_warps=8",
            "load": "4",
        },
    ],
    ids=[
        "half",
        "all_of_the_memory",
        "fp32_in_full",
        "no_product",
        "waits",
        "tile",
        "nchw",
        "taps",
        "tf32",
    ],
)
def test_gates_that_hold(changes):
    assert compiled.problems([row(**changes)]) == []


def test_nothing_is_compiled_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(COMMAND, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: nothing is compiled while TRITON_INTERPRET is set\n"


def test_only_versions_that_held_every_gate_are_seen():
    assert compiled.is_seen("3.6.0")
    assert compiled.is_seen("3.9.1")
    assert compiled.is_seen("3.8.0+git.1")
    assert not compiled.is_seen("weird")
    assert not compiled.is_seen("3.10.0")
    assert not compiled.is_seen("4.0.0+git123")


def test_of_an_unseen_version_only_what_does_not_fit_counts():
    rows = [row(stack="8"), row(load="2"), row(shared="232449")]
    assert len(compiled.problems(rows)) == 3
    [problem] = compiled.does_not_fit(rows)
    assert "of shared memory, over 232448" in problem


@pytest.fixture
def command(monkeypatch):
    """Runs the command with what it would have compiled, by a version of Triton."""

    def run(*arguments, rows=(), failures=(), version="3.9.0"):
        done = compiled.Compiled(list(rows), list(failures))
        monkeypatch.setattr(compiled, "compile_all", lambda *_: done)
        monkeypatch.setattr(sys, "argv", ["compiled", *map(str, arguments)])
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        return compiled.main()

    return run


SPILLS, TOO_LARGE = row(stack="8"), row(shared="232449")


@pytest.mark.parametrize(
    ("version", "rows", "failures", "code"),
    [
        ("3.9.0", [row()], [], 0),
        ("3.9.0", [SPILLS], [], 1),
        ("9.0.0", [SPILLS], [], 0),
        ("9.0.0", [TOO_LARGE], [], 1),
        ("9.0.0", [], ["does not compile"], 1),
    ],
    ids=["sound", "spills", "unseen spills", "unseen does not fit", "does not compile"],
)
def test_the_command_fails_for(command, capsys, version, rows, failures, code):
    assert command(rows=rows, failures=failures, version=version) == code
    said = capsys.readouterr().err.splitlines()
    assert said == [*failures, *compiled.problems(rows)]


def test_bad_input_ends_before_anything_is_compiled(command, capsys, monkeypatch, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    columns = ", ".join(compiled.COLUMNS)
    for arguments, message in (
        (["--processes", 0], "--processes: expected at least 1, got 0"),
        (["--write", other / "x.csv"], f"{other}: expected a folder that can be written (File"),
        (["--write", tmp_path], f"{tmp_path}: expected a file to write, this is a folder"),
        (["--write", other], f"{other}: expected a table with the columns {columns}"),
    ):
        assert command(*arguments, rows=[row()]) == 2
        output = capsys.readouterr()
        assert output.err.startswith(f"error: {message}")
        assert output.out == ""
    assert other.read_text() == "a,b\n1,2\n"


def test_a_kernel_that_does_not_compile_is_named_and_the_others_go_on(monkeypatch):
    def run(kernel, *_, **__):
        if kernel.__name__ == "wrong":
            raise ValueError("no registers\nptxas says more")

    def launch():
        for name in ("wrong", "wrong", "right"):
            JITFunction.run(SimpleNamespace(__name__=name), grid=(1,), warmup=False, num_warps=4)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "set_active", lambda driver: None)
    monkeypatch.setattr(compiled, "figures", lambda code: [0] * len(compiled.Figures._fields))
    of_both = SimpleNamespace(arch="sm_90", dtype="bf16", kernels=None, note="", run=launch)
    rows, failures = compiled.compile_group(Group((of_both,)))
    assert failures == ["wrong, sm_90, bf16, num_warps=4, : does not compile: no registers"]
    assert [row["kernel"] for row in rows] == ["right"]


def test_a_run_leaves_the_rows_of_other_versions(tmp_path):
    path = tmp_path / "compiled.csv"
    other, stale = row(triton="3.5.0"), row(triton=triton.__version__, constants="gone")
    compiled.write_table(path, [other, stale])
    new = row(triton=triton.__version__)
    compiled.write_table(path, [new])
    assert compiled.read_table(path) == [other, new]
