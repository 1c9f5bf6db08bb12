"""Kernels for Hopper GPUs as compiled: what the simulator, which knows no threads, cannot show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from emanet_triton.bench.ahead_of_time.launches import ONE_PASS, OVERLAPPING

ROOT = Path(__file__).parents[2]
ROLES = {"conv_boxes": 4, "em_output": 7}  # kernels whose warps have roles, and their arrivals
# Kernels that let the next one start early, and all that wait for the kernel before them.
TRIGGERING = set(OVERLAPPING)
WAITING = TRIGGERING | set(ONE_PASS)

# Prints the codes of the kernels by this version of Triton for sm_90.
COMPILE = """
import json
from emanet_triton.bench.ahead_of_time import code, gates, launches
found = []
def note(compiled):
    data, sass = compiled.metadata, code.dumped(compiled.asm["cubin"], "-sass")
    found.append((data.name, data.launch_pdl, compiled.asm["ptx"], sass))
    return [0] * len(gates.Figures._fields)
gates.figures = note
layer = next(layer for layer in launches.BOXES if layer[8])  # with a residual
products = "sm_90", "bf16", "ieee"
for launch in (
    launches.BoxesLaunch(*products, layer),
    launches.EMLaunch(*products, "em_attention_block", 512, 64, ranges=128),
    launches.EMLaunch(*products, "em_attention", 512, 64, ranges=128),
):
    assert not gates.compile_group(launches.Group((launch,))).failures
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """The name of each kernel, whether it may start early, its PTX and its machine code."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-c", COMPILE)
    return json.loads(subprocess.check_output(command, env=environment, text=True))


ALONE = re.compile(r"wgmma\.wait_group|fence\.proxy\.async")  # each warp's own work is over
TOGETHER = re.compile(r"bar\.sync\s+\d+, 256;")  # now that of all eight warps
ARRIVAL = re.compile(r"mbarrier\.arrive\.shared")


def arrivals(ptx: str) -> list[bool]:
    """For each arrival of the code: whether all eight warps have met since their own work."""
    found, have_met = [], True
    for line in ptx.splitlines():
        if ALONE.search(line):
            have_met = False
        elif TOGETHER.search(line):
            have_met = True
        elif ARRIVAL.search(line):
            found.append(have_met)
    return found


@pytest.mark.parametrize("kernel", ROLES)
def test_all_warps_meet_before_one_thread_arrives(compiled, kernel):
    """It arrives at an mbarrier for all warps of its role."""
    [ptx] = [ptx for name, _, ptx, _ in compiled if name == kernel]
    assert arrivals(ptx) == [True] * ROLES[kernel]
    without = "\n".join(line for line in ptx.splitlines() if not TOGETHER.search(line))
    assert not all(arrivals(without))


WAIT, TRIGGER = "ACQBULK", "PREEXIT"
LOADS = {"LD", "LDG", "LDGSTS", "UBLKCP", "UTMALDG"}
STORES = {"ST", "STG", "RED", "REDG", "ATOM", "ATOMG", "UTMASTG"}
JUMPS = {"BRA", "BRX", "CALL", "EXIT", "RET"}
EVENT = re.compile(rf"\b({'|'.join((WAIT, TRIGGER, *LOADS, *STORES, *JUMPS))})\b")
CONDITIONAL = re.compile(rf"@!?U?P\w+ +({WAIT}|{TRIGGER})")


def test_kernels_start_early_but_for_the_first_and_the_reconstruction(compiled):
    starts = [(name, is_early) for name, is_early, _, _ in compiled if name != "conv_boxes"]
    assert {name for name, is_early in starts if is_early} == WAITING - {"em_fold"}
    late = [name for name, is_early in starts if not is_early]
    assert late == ["em_fold", "em_stage", "em_reconstruct"]


@pytest.mark.parametrize("kernel", sorted(WAITING - set(ROLES)))
def test_memory_is_touched_after_the_kernel_before_has_ended(compiled, kernel):
    codes = [sass for name, _, _, sass in compiled if name == kernel]
    assert codes
    for sass in codes:
        found = EVENT.findall(sass)
        assert not CONDITIONAL.search(sass)
        assert found.count(WAIT) == 1
        before, after = found[: found.index(WAIT)], found[found.index(WAIT) + 1 :]
        assert before == (["UTMALDG"] * 2 if kernel == "em_stage" else [])  # tiles of features
        assert STORES & set(after)
        assert after.count(TRIGGER) == (kernel in TRIGGERING)
        if kernel in TRIGGERING:
            assert after[0] == TRIGGER


def test_the_loading_and_the_storing_warp_of_em_output_wait(compiled):
    """When they wait, the simulator shows: see test_em_output.py."""
    [sass] = [sass for name, _, _, sass in compiled if name == "em_output"]
    assert EVENT.findall(sass).count(WAIT) == 2
    assert EVENT.findall(sass).count(TRIGGER) == 0
    assert not CONDITIONAL.search(sass)
