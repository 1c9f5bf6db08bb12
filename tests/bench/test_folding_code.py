"""The EM block's small products as compiled: on tensor cores each warp adds a chain of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emanet_triton.kernels.em.tiles import tile
from emanet_triton.kernels.tile import ARCHS

ROOT = Path(__file__).parents[2]
KERNELS = "em_fold", "em_project"

# Prints the name of each compiled kernel, and its code in Triton's dialect for GPUs.
COMPILE = f"""
import json, sys
from emanet_triton.bench.ahead_of_time import gates, launches
found = []
def note(compiled):
    found.append((compiled.metadata.name, compiled.asm["ttgir"], compiled.asm.get("ptx", "")))
    return [0] * len(gates.Figures._fields)
gates.figures = note
products = sys.argv[1:]
launch = launches.EMLaunch(*products, "em_attention_block", 512, 64, kernels={KERNELS})
assert not gates.compile_group(launches.Group((launch,))).failures
print(json.dumps(found))
"""
PRODUCTS = re.compile(r"#ttg\.(?:nvidia_mma|amd_mfma)<\{.*?warpsPerCTA = (\[[^]]*\])")


def compiled_by(*products: str) -> list[tuple[str, str, str]]:
    """The name of each kernel, its code for GPUs, and its PTX, empty for AMD."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-c", COMPILE, *products)
    compiled = json.loads(subprocess.check_output(command, env=environment, text=True))
    assert {name for name, *_ in compiled} == set(KERNELS)
    return compiled


def warps_of(*products: str) -> dict[str, set[str]]:
    """How the warps of each kernel share its products, by kernel: chains, rows and columns."""
    compiled = compiled_by(*products)
    return {
        kernel: {
            warps
            for name, code, _ in compiled
            if name == kernel
            for warps in PRODUCTS.findall(code)
        }
        for kernel in KERNELS
    }


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "tf32x3")])
def test_each_warp_has_a_chain(arch, dtype, precision):
    chosen = tile("em_project", arch, dtype, 512, 64, precision=precision)
    assert chosen.meta["CHAINS"] == chosen.num_warps == 4
    wanted = {"[4, 1, 1]"}
    assert warps_of(arch, dtype, precision) == dict.fromkeys(KERNELS, wanted)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_without_tensor_cores_there_is_one_chain(arch):
    assert tile("em_project", arch, "fp32", 512, 64, precision="ieee").meta["CHAINS"] == 1
    assert warps_of(arch, "fp32", "ieee") == {kernel: set() for kernel in KERNELS}


def test_chains_are_added_without_a_barrier_for_each_few_numbers():
    """With ``tl.sum`` there are twice as many barriers in Triton 3.8, one after the other."""
    barriers = [
        (name, code.count("bar.sync")) for name, _, code in compiled_by("sm_90", "bf16", "ieee")
    ]
    assert all(0 < count <= (20 if name == "em_fold" else 30) for name, count in barriers)
