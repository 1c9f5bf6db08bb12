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

# Prints for each target, dtype and precision the compiled kernels: the name of each, its code in
# Triton's dialect for GPUs, and its PTX.
COMPILE = f"""
import json, sys
from emanet_triton.bench.ahead_of_time import gates, launches
found = {{}}
def note(compiled):
    code = compiled.asm["ttgir"], compiled.asm.get("ptx", "")
    found.setdefault(products, []).append((compiled.metadata.name, *code))
    return [0] * len(gates.Figures._fields)
gates.figures = note
for products in sys.argv[1:]:
    sizes = "em_attention_block", 512, 64
    launch = launches.EMLaunch(*products.split(), *sizes, kernels={KERNELS})
    assert not gates.compile_group(launches.Group((launch,))).failures
print(json.dumps(found))
"""
ON_TENSOR_CORES = [(arch, *how) for how in (("bf16", "ieee"), ("fp32", "tf32x3")) for arch in ARCHS]
IN_FULL = [(arch, "fp32", "ieee") for arch in ("sm_80", "sm_90", "sm_100")]
PRODUCTS = re.compile(r"#ttg\.(?:nvidia_mma|amd_mfma)<\{.*?warpsPerCTA = (\[[^]]*\])")


@pytest.fixture(scope="module")
def compiled():
    """By the words of products: name of each kernel, its code for GPUs, its PTX, empty for AMD."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-c", COMPILE, *map(" ".join, (*ON_TENSOR_CORES, *IN_FULL)))
    found = json.loads(subprocess.check_output(command, env=environment, text=True))
    assert all({name for name, *_ in kernels} == set(KERNELS) for kernels in found.values())
    return found


def warps_of(kernels: list[list[str]]) -> dict[str, set[str]]:
    """How the warps of each kernel share its products, by kernel: chains, rows and columns."""
    return {
        kernel: {
            warps for name, code, _ in kernels if name == kernel for warps in PRODUCTS.findall(code)
        }
        for kernel in KERNELS
    }


@pytest.mark.parametrize("products", ON_TENSOR_CORES, ids=" ".join)
def test_each_warp_has_a_chain(compiled, products):
    arch, dtype, precision = products
    chosen = tile("em_project", arch, dtype, 512, 64, precision=precision)
    assert chosen.meta["CHAINS"] == chosen.num_warps == 4
    wanted = {"[4, 1, 1]"}
    assert warps_of(compiled[" ".join(products)]) == dict.fromkeys(KERNELS, wanted)


@pytest.mark.parametrize("products", IN_FULL, ids=" ".join)
def test_without_tensor_cores_there_is_one_chain(compiled, products):
    arch, dtype, precision = products
    assert tile("em_project", arch, dtype, 512, 64, precision=precision).meta["CHAINS"] == 1
    assert warps_of(compiled[" ".join(products)]) == {kernel: set() for kernel in KERNELS}


def test_chains_are_added_without_a_barrier_for_each_few_numbers(compiled):
    """With ``tl.sum`` there are twice as many barriers in Triton 3.8, one after the other."""
    barriers = [(name, code.count("bar.sync")) for name, _, code in compiled["sm_90 bf16 ieee"]]
    assert all(0 < count <= (20 if name == "em_fold" else 30) for name, count in barriers)
