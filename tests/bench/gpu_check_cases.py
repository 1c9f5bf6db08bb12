"""Work that breaks its process; a child finds it here by its name."""

import os
import signal
import time
from dataclasses import dataclass

import torch

from emanet_triton.bench.gpu_check.compared import equal

DEAD = []  # errors after which nothing runs in this process


@dataclass(frozen=True)
class Breaks:
    """Does what its name says."""

    name: str

    def compare(self, device):
        if DEAD:
            raise DEAD[0]
        if self.name == "aborts":
            os.abort()
        if self.name == "hangs":
            time.sleep(600)
        if self.name == "raises":
            raise ValueError("no such thing\nand more")
        if self.name == "sticky":
            DEAD.append(RuntimeError("CUDA error: an illegal memory access was encountered\nand"))
            raise DEAD[0]
        got = torch.zeros(2, 3)
        return [equal("out", got, got + (self.name == "wrong"))]


def job(name, watch):
    """For a lane: its name, its process, and whether Ctrl-C does not reach that."""
    if name == "aborts":
        os.abort()
    if name == "sleeps":
        time.sleep(600)
    return name, os.getpid(), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
