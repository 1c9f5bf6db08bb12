"""Large pages for the tensors of a command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emanet_triton.heap import LARGE_PAGES

ROOT = Path(__file__).parents[1]
# Prints whether Linux is asked for large pages ("hg") where a tensor of 256 MB lies.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from emanet_triton.command import run

def main():
    tensor = torch.empty(2**28, dtype=torch.uint8)
    middle = tensor.data_ptr() + 2**27
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *fields = line.split()
        if "-" in first:
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= middle < end
        elif first == "VmFlags:" and inside:
            print("hg" in fields)
    return 0

"""


def is_asked(ending: str, **environment: str) -> str:
    alone = {name: value for name, value in os.environ.items() if name != LARGE_PAGES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + ending],
        env=alone | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux without large pages"
)
def test_a_command_line_asks_for_large_pages():
    assert is_asked("run(main)") == "True"
    assert is_asked("run(main)", **{LARGE_PAGES: "0"}) == "False"  # the user's value stays
    assert is_asked("main()") == "False"  # else neither check above would show anything
