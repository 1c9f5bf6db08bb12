"""Kernels are compiled ahead, really, and found again; a rehearsal from end to end.

Triton's interpreter is on in these tests, so all that compiles runs in processes without it.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from emanet_triton.bench.gpu_check import sweep

ROOT = Path(__file__).parents[2]
KERNELS = {
    *("conv_rows", "conv_pointers", "conv_taps", "conv_boxes", "conv_expand_reduce"),
    *("em_e_step", "em_m_step", "em_stage", "em_output", "em_reduce", "em_reconstruct"),
    *("em_project", "em_fold", "em_normalise", "em_epilogue"),
    *("max_pool_kernel", "resample_kernel", "confusion_kernel"),
}


def run(*arguments, cache):
    """A process that compiles into a folder of its own."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_planned_launches_have_the_keys_of_real_ones(tmp_path):
    done = run(Path(__file__).with_name("gpu_check_keys.py"), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, found = done.stdout.splitlines()
    assert {name for line in lines for name in line.split()[1:]} == KERNELS
    assert found == "found again: conv_rows 90"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What a rehearsal of the stage profile prints, and its archive."""
    out = tmp_path_factory.mktemp("rehearsal")
    return rehearse("profile", out), out / "gpu-check-profile.tar"


def rehearse(stage, out, *arguments):
    given = ["--stage", stage, "--rehearse", "--tiny", "--out", str(out), "--processes", "2"]
    done = run("-m", "emanet_triton.bench", "gpu-check", *given, *arguments, cache=out / "unused")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (out / "unused").exists()
    return done.stdout


def warmed(path):
    """What the step warm of an archive says."""
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile("01-warm/warm.json"))


def test_a_rehearsal_compiles_packs_and_prints_a_summary(rehearsal):
    text, path = rehearsal
    lines = text.splitlines()
    assert len(lines) <= 60
    assert re.fullmatch(
        r"gpu-check --stage profile, rehearsal: nothing was measured: 5 passed, 2 absent, \d+ s",
        lines[0],
    )
    warm = warmed(path)
    assert (warm["arch"], warm["hits"], warm["failed"]) == ("sm_90", 0, [])
    assert warm["compiled"] == warm["distinct"] >= len(KERNELS)
    assert warm["planned"] > warm["distinct"]
    with (
        tarfile.open(path) as tar,
        tarfile.open(fileobj=tar.extractfile("triton_cache.tar.xz")) as packed,
    ):
        names = tar.getnames()
        binaries = [name for name in packed.getnames() if name.endswith(".cubin")]
    assert {Path(name).stem for name in binaries} == KERNELS
    assert len(binaries) == warm["distinct"]
    for name in ("02-sweep/sweep.csv", "00-versions/versions.json"):
        assert name in names
    assert "03-ncu/log.txt" not in names


def test_a_carried_cache_gives_only_hits(rehearsal, tmp_path):
    _, path = rehearsal
    text = rehearse("run", tmp_path, "--triton-cache", str(path))
    warm = warmed(tmp_path / "gpu-check-run.tar")
    assert (warm["hits"], warm["compiled"], warm["failed"]) == (warm["distinct"], 0, [])
    assert warm["distinct"] >= len(KERNELS)
    assert re.search(r"^kernels carried: \d+$", text, re.M)
    assert "no carried kernel was used" not in text


# Prints the calls by Triton's kernels that a stage makes and the warm-up does not plan.
UNPLANNED = """
from emanet_triton.bench.gpu_check import families, meta
gpu = meta.Gpu.of_arch("sm_90")
planned = {launch.call for launch in families.launches(gpu, tiny=False)}
half = families.network_calls(["r50", "r101"], ["whole", "slide"])
single = families.network_calls(["emanet_demo"], ["whole"], "fp32", (256, 512))
wanted = [call.but(backend="triton") for call in half]
wanted += families.convolutions(single, "triton", "tf32x3")
wanted += [call.but(backend="triton") for call in single if call.name != "conv_bias_act"]
missing = [call for call in wanted if meta.has_kernel(call) and call not in planned]
print(len(wanted), missing)
"""


def test_what_the_networks_launch_is_planned(tmp_path):
    done = run("-c", UNPLANNED, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    count, missing = done.stdout.split(maxsplit=1)
    assert int(count) > 80
    assert missing == "[]\n"


# Prints what the tiles of an EM kernel need, those of the first one again.
NEEDED = """
from emanet_triton.bench.gpu_check import meta, sweep
gpu = meta.Gpu.of_arch("sm_90")
*_, swept = sweep.dominant(True)
tiles = sweep.tiles_of(swept, gpu, True).values()
for tile in (*tiles, *list(tiles)[:1]):
    print(sweep.resources(meta.Launch(swept.call, tile), gpu))
"""


def test_what_a_tile_needs_is_said_for_each_use_of_its_kernel(tmp_path):
    """With bases that are normalised and with parts of them, also if both are compiled already."""
    done = run("-c", NEEDED, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    first, _, second, _, *again = lines = done.stdout.splitlines()
    assert again == lines[:2]
    assert first.startswith("em_e_step 128x64 w4 s3: ")
    assert second.startswith("em_e_step 128x64 w4 s4: ")
    needs = r": \d+ bytes of shared memory, \d+ registers and 0 bytes of stack a thread$"
    assert all(re.search(needs, line) for line in lines)


# Prints how many tiles each case of the sweep has, how many different kernels they launch, in how
# many uses each, and whether the first is the shipped tile.
SWEPT = """
from emanet_triton.bench.gpu_check import meta, sweep
gpu = meta.Gpu.of_arch("sm_90")
for swept in sweep.dominant(False):
    tiles = sweep.tiles_of(swept, gpu, False).values()
    found = [meta.kernels_of(meta.Launch(swept.call, tile), gpu) for tile in tiles]
    own = [{key for key in keys if key.name == tile.kernel}
           for tile, keys in zip(tiles, found, strict=True)]
    shipped = meta.kernels_of(meta.Launch(swept.call), gpu)
    kernel = swept.kernel or swept.call.name
    print(kernel, len(tiles), len(set.union(*own)), len(own[0]), shipped == found[0])
"""


def test_every_tile_of_the_sweep_is_a_kernel_of_its_own(tmp_path):
    done = run("-c", SWEPT, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = [name for name, *_ in lines]
    convolutions = [*["conv_bias_act"] * 4, *["expand_reduce"] * 3, "conv_bias_act"]
    assert names == [*convolutions, *sweep.EM_CANDIDATES]
    for name, tiles, kernels, uses, first_is_shipped in lines:
        assert int(tiles) * int(uses) == int(kernels)
        assert int(tiles) > 5
        assert int(uses) == (2 if name in ("em_e_step", "em_project") else 1)
        assert first_is_shipped == "True"
