"""Compile every tile of the convolution kernels for its target, without a GPU.

Prints what came out, a line of JSON for each. Every tile is compiled in the first use below that
reaches it; those of bf16 on sm_90, or with --every-use all of them, in each use that is a kernel
of its own. Meant to be run without TRITON_INTERPRET: the launchers run on tensors of the meta
device, under a Triton driver that names a target and can do nothing else, so that each kernel is
compiled as it would be launched.
"""

import json
import re
import subprocess
import sys
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from emanet_triton.kernels import conv_bottleneck, conv_tiles, conv_triton
from emanet_triton.kernels.device import DTYPE_NAMES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
HALF, SINGLE = None, torch.float32  # of a residual or an output: the images' dtype, float32

# batch, C, H, W, O, kernel, stride, dilation, residual or not, its dtype, dtype of the output:
# layers of the network, and with odd sizes, that reach every tile.
CONVOLUTIONS = (
    (1, 512, 128, 256, 512, 3, 1, 4, True, HALF, HALF),
    (1, 128, 128, 256, 128, 3, 1, 1, False, HALF, HALF),
    (1, 64, 256, 512, 64, 3, 1, 1, True, HALF, HALF),
    (1, 64, 256, 512, 256, 1, 1, 1, True, HALF, HALF),  # expand
    (1, 2048, 128, 256, 256, 3, 1, 1, False, HALF, SINGLE),  # conv_cat, first half
    (1, 256, 128, 256, 256, 3, 1, 1, True, SINGLE, HALF),  # conv_cat, second half
    (1, 128, 256, 512, 128, 3, 2, 1, False, HALF, HALF),
    (1, 256, 256, 512, 512, 1, 2, 1, False, HALF, HALF),
    (2, 512, 97, 97, 512, 3, 1, 4, True, HALF, HALF),
    (2, 256, 193, 193, 512, 1, 2, 1, False, HALF, HALF),
    (2, 256, 97, 97, 256, 3, 1, 1, True, SINGLE, HALF),
    (1, 128, 97, 97, 128, 3, 1, 1, False, HALF, HALF),
    (1, 128, 193, 193, 128, 3, 2, 1, True, HALF, HALF),
    (1, 64, 193, 193, 64, 3, 1, 1, True, HALF, HALF),
    (1, 3, 512, 1024, 32, 3, 2, 1, False, HALF, HALF),  # stem
    (1, 32, 256, 512, 64, 3, 1, 1, False, HALF, HALF),  # stem
)
BOTTLENECKS = (  # C, planes, O
    (64, 64, 256),
    (256, 64, 256),
    (512, 128, 512),
)


class Compiler:
    """A Triton driver of an architecture: all that the launch path asks before it launches."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return TARGETS[self.arch]

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def launch_all(arch, dtype, precision):
    meta = {"dtype": DTYPES[dtype], "device": "meta"}

    def image(*shape, dtype=None):
        options = meta | ({"dtype": dtype} if dtype else {})
        return torch.empty(shape, **options, memory_format=torch.channels_last)

    for batch, c, height, width, o, kernel, stride, dilation, *rest in CONVOLUTIONS:
        has_residual, residual_dtype, out_dtype = rest
        size = batch, o, (height - 1) // stride + 1, (width - 1) // stride + 1
        conv_triton.conv_bias_act(
            image(batch, c, height, width), image(o, c, kernel, kernel),
            torch.empty(o, device="meta"),
            image(*size, dtype=residual_dtype) if has_residual else None,
            stride, dilation, out_dtype is HALF, out_dtype or DTYPES[dtype], precision, arch,
        )  # fmt: skip
    if dtype == "fp32":
        return
    for channels, planes, outputs in BOTTLENECKS:
        weights = image(planes, channels, 1, 1), image(planes, planes, 3, 3)
        weights += (image(outputs, planes, 1, 1),)
        biases = [torch.empty(w.shape[0], device="meta") for w in weights]
        x, residual = image(1, channels, 255, 511), image(1, outputs, 255, 511)
        conv_bottleneck.bottleneck(x, weights, biases, residual, arch)


def figures(compiled):
    """Registers, bytes of stack, tensor-core instructions and waits for them."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, scratch, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        return registers, scratch + 4 * spilled, len(re.findall("v_mfma", assembly)), 0
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK"))
    products = len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)", dump))
    return registers, stack, products, dump.count("WARPGROUP.DEPBAR")


def main(every_use):
    rows = {}
    run, launch, tiles = JITFunction.run, conv_triton.launch, []

    def record(kernel, tile, *arguments, **constants):
        tiles.append(tile)
        launch(kernel, tile, *arguments, **constants)

    def compile_only(self, *args, grid, warmup, **kwargs):
        tile = tiles[-1]
        uses = {k: v for k, v in kwargs.items() if k.isupper() and k not in tile.meta}
        uses["dtypes"] = " ".join(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
        each = every_use or (tile.arch, tile.dtype) == ("sm_90", "bf16")
        key = f"{tile}, {uses}" if each else str(tile)
        if key not in rows:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            names = ("registers", "stack", "products", "waits")
            rows[key] = dict(zip(names, figures(compiled), strict=True)) | {
                "shared": compiled.metadata.shared, "tile": str(tile), "uses": uses,
                "arch": tile.arch, "in_full": tile.meta.get("PRECISION") == "ieee"
                and tile.dtype == "fp32" and tile.arch != "gfx942",
            }  # fmt: skip
            print(json.dumps(rows[key]), flush=True)

    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(conv_triton, "launch", record),
        mock.patch.object(conv_bottleneck, "launch", record),
    ):
        for arch, dtype, precision in dict.fromkeys(
            (tile.arch, tile.dtype, tile.meta.get("PRECISION", "ieee"))
            for tile in conv_tiles.SHIPPED
        ):
            triton.runtime.driver.set_active(Compiler(arch))
            launch_all(arch, dtype, precision)


if __name__ == "__main__":
    main("--every-use" in sys.argv[1:])
