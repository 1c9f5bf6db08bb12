"""Compile every configuration of the resampling kernels for every target, without a GPU.

Prints a JSON list of what came out. Meant to be run without TRITON_INTERPRET: the launchers run on
tensors of the meta device, under a Triton driver that names a target and can do nothing else, so
that each kernel is compiled as it would be launched.
"""

import json
import re
import subprocess
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from emanet_triton.kernels import resample_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CLASSES = (19, 64)
MODES = {"single": (1, False), "views": (12, False), "probabilities": (12, True)}


class Compiler:
    """A Triton driver of a target: all that the launch path asks before it launches."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def launch_all():
    """Launch every configuration at the size of Cityscapes, saying which before each."""
    for dtype in DTYPES:
        for classes in CLASSES:
            logits = torch.empty(1, classes, 32768, dtype=DTYPES[dtype], device="meta")
            for mode, (views, probabilities) in MODES.items():
                tables = [
                    torch.empty(views, 3, n_out, dtype=kind, device="meta")
                    for n_out in (1024, 2048)
                    for kind in (torch.int32, torch.float32)
                ]
                yield f"{mode}-{classes}-{dtype}"
                resample_triton.resample(logits, tables, probabilities=probabilities)
    images = torch.empty(1, 1024, 2048, dtype=torch.uint8, device="meta")
    for classes in CLASSES:
        yield f"confusion-{classes}"
        resample_triton.confusion(images, images, classes)


def figures(compiled):
    """Registers, bytes of stack and bytes of shared memory."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, scratch, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        stack = scratch + 4 * spilled
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            dump = subprocess.check_output(command, text=True)
        registers, stack = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def main():
    rows, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        rows.append(figures(run(self, *args, grid=grid, warmup=True, **kwargs)))

    with mock.patch.object(JITFunction, "run", compile_only):
        for arch, target in TARGETS.items():
            triton.runtime.driver.set_active(Compiler(target))
            hip = "a version" if target.backend == "hip" else None
            with mock.patch.object(torch.version, "hip", hip):
                names = list(launch_all())
            for name, row in zip(names, rows[-len(names) :], strict=True):
                row |= {"arch": arch, "name": name}
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
