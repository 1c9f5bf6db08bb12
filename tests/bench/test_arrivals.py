"""Kernels in Gluon as compiled: warps of a group wait for one another before one thread arrives.

It arrives at an mbarrier for all of them. The simulator of these kernels knows no threads.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {"conv_boxes": 4, "em_output": 7}  # whose warps have roles, and their arrivals

# Prints the code of the kernel that is asked for, by this version of Triton for sm_90.
COMPILE = """
import sys
from emanet_triton.bench.ahead_of_time import gates, launches
gates.figures = lambda compiled: print(compiled.asm["ptx"]) or [0] * len(gates.Figures._fields)
layer = next(layer for layer in launches.BOXES if layer[8])  # with a residual
kernel = sys.argv[1]
launch = {
    "conv_boxes": launches.BoxesLaunch("sm_90", "bf16", "ieee", layer),
    "em_output": launches.EMLaunch(
        "sm_90", "bf16", "ieee", "em_attention_block", 512, 64, ranges=128, kernels=("em_output",)
    ),
}[kernel]
assert not gates.compile_group(launches.Group((launch,))).failures
"""

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


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_warps_meet_before_one_thread_arrives(kernel):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    command = (sys.executable, "-c", COMPILE, kernel)
    ptx = subprocess.check_output(command, env=environment, text=True)
    assert arrivals(ptx) == [True] * KERNELS[kernel]
    without = "\n".join(line for line in ptx.splitlines() if not TOGETHER.search(line))
    assert not all(arrivals(without))
