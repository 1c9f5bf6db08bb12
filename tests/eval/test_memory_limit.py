"""A limit of this process's memory that is real ends in an answer."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
import torch
from emanet_triton import create_model, segment
from emanet_triton.errors import InputError
from emanet_triton.models.protocol import Protocol

torch.set_num_threads(2)
model = create_model("emanet_r50-d8_512x1024_80k_cityscapes")
image = np.zeros((256, 512, 3), np.uint8)
segment(model, image[:64, :64], protocol=Protocol(base_scale=(64, 64)))  # the libraries are loaded
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
try:
    segment(model, image, protocol=Protocol(base_scale=(512, 256)))
except InputError as error:
    print(error)
"""
MESSAGE = (
    "out of memory on cpu with an image of 512x256 pixels at batch size 1; a smaller image, "
    "another device or half precision is needed\n"
)


@pytest.mark.parametrize("megabytes", [20, 40, 80])
def test_a_limit_of_memory_ends_in_a_message(megabytes):
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, MESSAGE, "")
