"""Compile every shipped configuration for its target, without a GPU, and read what came out.

    python -m emanet_triton.kernels.compiled [--write PATH] [--shipped-only]

The operators' own launchers run on tensors of the meta device, under a driver that names a
target and can do nothing else, so that each kernel is compiled exactly as it would be launched.
"""

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from emanet_triton.kernels.compiled_launches import Group, Launch, groups

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes a program may have; sm_80 itself has 166,912, but its tiles serve its smaller kin too.
SHARED_LIMITS = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TILE_NAMES = ("PRECISION", "P", "ROWS")  # of a tile, beside its blocks
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)")

COLUMNS = (
    *("kernel", "target", "dtype", "configuration", "constants"),
    *("registers", "stack", "shared", "tensor_core", "count", "waits", "triton"),
)
KEY = COLUMNS[:5]


def compile_group(group: Group) -> list[dict[str, str]]:
    """Run the launchers of a group: a row for each of their kernels of interest."""
    rows, tiles = {}, set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = self.__name__
        key = _key(kernel, launch, kwargs)
        done = key in rows if group.every_use else key[:4] in tiles
        if done or not (launch.kernels is None or kernel in launch.kernels):
            return
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:
            raise RuntimeError(f"does not compile: {key}: {error}") from error
        tiles.add(key[:4])
        rows[key] = dict(zip(COLUMNS, (*key, *_figures(compiled)), strict=True))

    for launch in group.launches:
        triton.runtime.driver.set_active(_Compiler(launch.arch))
        hip = "a version" if TARGETS[launch.arch].backend == "hip" else None
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(torch.version, "hip", hip),
        ):
            launch.run()
    return list(rows.values())


class _Compiler:
    """A Triton driver of an architecture: all that the launch path asks before it launches."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0


def _key(kernel: str, launch: Launch, arguments: dict) -> tuple[str, ...]:
    meta = {n: v for n, v in arguments.items() if n.startswith("BLOCK") or n in TILE_NAMES}
    constants = [f"{n}={v}" for n, v in arguments.items() if n.isupper() and n not in meta]
    tile = configuration(meta, arguments["num_warps"], arguments.get("num_stages"))
    return kernel, launch.arch, launch.dtype, tile, " ".join((*constants, launch.note))


def configuration(meta: Mapping[str, object], num_warps: int, num_stages: int | None) -> str:
    """A tile as the table writes it."""
    options = dict(sorted(meta.items())) | {"num_warps": num_warps, "num_stages": num_stages}
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def _figures(compiled: CompiledKernel) -> tuple[str, ...]:
    """What the columns after the key hold."""
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    registers, stack, instructions, waits = read(compiled)
    [(instruction, count)] = Counter(instructions).most_common(1) or [("", 0)]
    instruction = instruction.removeprefix("v_").upper()
    shared = compiled.metadata.shared
    figures = registers, stack, shared, instruction, count, waits, triton.__version__
    return tuple(map(str, figures))


def _read_nvidia(compiled: CompiledKernel) -> tuple[int, int, list[str], int]:
    """Registers, bytes of stack, the tensor-core instructions and sm_90's waits for them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
        if "mma." in compiled.asm["ptx"]:  # disassembling takes its time
            command.append("-sass")
        done = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    registers, stack = (int(re.search(rf"{n}:(\d+)", done.stdout)[1]) for n in ("REG", "STACK"))
    waits = done.stdout.count("WARPGROUP.DEPBAR")
    return registers, stack, TENSOR_CORE.findall(done.stdout), waits


def _read_amd(compiled: CompiledKernel) -> tuple[int, int, list[str], int]:
    """As ``_read_nvidia``: vector registers and accumulators, scratch memory with its spills."""
    assembly = compiled.asm["amdgcn"]
    registers, scratch, spilled = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, scratch + 4 * spilled, TENSOR_CORE.findall(assembly), 0


def compile_all(everything: bool, processes: int) -> list[dict[str, str]]:
    """Rows of every shipped configuration, sorted; each process compiles a group at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        rows = {
            tuple(row[name] for name in KEY): row
            for found in pool.map(compile_group, groups(everything))
            for row in found
        }
    return [rows[key] for key in sorted(rows)]


def problems(rows: Iterable[dict[str, str]]) -> list[str]:
    """What breaks a gate.

    A stack, too much shared memory, no tensor core where one is meant, or products of a convolution
    that wait for one another.
    """
    found = []
    for row in rows:
        what = ", ".join(row[name] for name in KEY)
        limit = SHARED_LIMITS[row["target"]]
        if int(row["stack"]):
            found.append(f"{what}: {row['stack']} bytes of stack")
        if int(row["shared"]) > limit:
            found.append(f"{what}: {row['shared']} bytes of shared memory, over {limit}")
        if uses_tensor_cores(row) != bool(int(row["count"])):
            found.append(f"{what}: {row['count']} tensor-core instructions")
        # Where the assembler serialises products a wait follows each; two there always are, one
        # in the loop, one after it.
        if row["kernel"].startswith("conv_") and int(row["waits"]) > max(2, int(row["count"]) // 2):
            found.append(f"{what}: {row['waits']} waits for {row['count']} products")
    return found


def uses_tensor_cores(row: dict[str, str]) -> bool:
    """Whether a kernel is meant to: products do, but those of fp32 in full on NVIDIA's."""
    if "PRECISION" not in row["configuration"]:
        return row["kernel"] == "conv_bottleneck"
    of_half = row["dtype"] != "fp32" and row["kernel"] not in ("em_project", "em_fold")
    return of_half or "PRECISION=ieee" not in row["configuration"] or row["target"] == "gfx942"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PATH", help="CSV file instead of a print")
    parser.add_argument(
        "--shipped-only", action="store_true", help="each tile once, in its commonest use"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("error: nothing is compiled while TRITON_INTERPRET is set", file=sys.stderr)
        raise SystemExit(2)
    rows = compile_all(not options.shipped_only, options.processes)
    with options.write.open("w", newline="") if options.write else sys.stdout as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    found = problems(rows)
    print(*found, sep="\n", file=sys.stderr)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
