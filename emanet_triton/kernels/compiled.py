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
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from emanet_triton.kernels import em_attention, em_block, tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)")

# Kernels whose tiles depend on C alone, and those that read or write a map of features.
BY_CHANNELS = ("em_reduce", "em_normalise")
OF_ATTENTION = ("em_reconstruct",)  # not in the block
OF_FEATURES = ("em_e_step", "em_m_step", "em_reconstruct", "em_epilogue")

COLUMNS = (
    *("kernel", "target", "dtype", "configuration", "constants"),
    *("registers", "stack", "shared", "tensor_core", "count", "triton"),
)
KEY = COLUMNS[:5]


@dataclass(frozen=True)
class Case:
    """A launcher, the features that it is run for, and the kernels of interest."""

    arch: str
    dtype: str
    precision: str
    operator: str
    channels: int
    bases: int
    channels_last: bool = True
    kernels: tuple[str, ...] = tuple(dict.fromkeys(t.kernel for t in tiles.SHIPPED))

    def run(self) -> None:
        """Launch on the meta device: channels-last maps are large, NCHW ones have odd sides."""
        dtype = {"dtype": DTYPES[self.dtype], "device": "meta"}
        feats = torch.empty(2, 32768, self.channels, **dtype)
        if not self.channels_last:
            feats = torch.empty(2, self.channels, 97 * 97, **dtype).mT
        bases = torch.empty(1, self.channels, self.bases, **dtype)
        if self.operator == "em_attention":
            em_attention.em_attention(feats, bases, 2, self.precision)
        else:
            weight, bias = torch.empty(self.channels, self.channels, **dtype), feats[0, 0]
            convolutions = weight, bias, weight, bias
            em_block.em_attention_block(feats, bases, *convolutions, 2, self.precision)


def cases(everything: bool) -> list[Case]:
    """What reaches every shipped configuration; with everything, each layout and use of it too."""
    attention, block = "em_attention", "em_attention_block"
    found = []
    for arch in TARGETS:
        for dtype in DTYPES:
            for precision in tiles.PRECISIONS if dtype == "fp32" else ("ieee",):
                products = (arch, dtype, precision)
                for bases in (64, 128, 256):
                    found.append(Case(*products, block, 512, bases))
                    found.append(Case(*products, attention, 512, bases, True, OF_ATTENTION))
                    if everything:
                        found.append(Case(*products, attention, 512, bases))
                        found.append(Case(*products, attention, 512, bases, False, OF_FEATURES))
                        found.append(Case(*products, block, 512, bases, False, OF_FEATURES))
            for channels in (64, 128, 256, 1024, 2048):
                exact = (arch, dtype, "ieee")
                found.append(Case(*exact, attention, channels, 64, True, BY_CHANNELS))
                found.append(Case(*exact, block, channels, 64, True, BY_CHANNELS))
    return found


def compile_case(case: Case) -> list[dict[str, str]]:
    """Run a launcher for one case: a row for each of its kernels of interest."""
    rows = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        key = _key(self.__name__, case, kwargs)
        if self.__name__ in case.kernels and key not in rows:
            try:
                compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:
                raise RuntimeError(f"does not compile: {key}: {error}") from error
            rows[key] = dict(zip(COLUMNS, (*key, *_figures(compiled)), strict=True))

    triton.runtime.driver.set_active(_Compiler(case.arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(em_attention, "architecture", lambda device: case.arch),
    ):
        case.run()
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


def _key(kernel: str, case: Case, arguments: dict) -> tuple[str, ...]:
    meta = {n: v for n, v in arguments.items() if n.startswith("BLOCK_") or n == "PRECISION"}
    constants = [f"{n}={v}" for n, v in arguments.items() if n.isupper() and n not in meta]
    constants.append("channels-last" if case.channels_last else "NCHW")
    tile = configuration(meta, arguments["num_warps"], arguments["num_stages"])
    return kernel, case.arch, case.dtype, tile, " ".join(constants)


def configuration(meta: Mapping[str, object], num_warps: int, num_stages: int) -> str:
    """A tile as the table writes it."""
    options = dict(sorted(meta.items())) | {"num_warps": num_warps, "num_stages": num_stages}
    return " ".join(f"{name}={value}" for name, value in options.items())


def _figures(compiled: CompiledKernel) -> tuple[str, ...]:
    """Registers, stack, shared memory, tensor-core instruction and its count, Triton version."""
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    registers, stack, instructions = read(compiled)
    [(instruction, count)] = Counter(instructions).most_common(1) or [("", 0)]
    instruction = instruction.removeprefix("v_").upper()
    figures = registers, stack, compiled.metadata.shared, instruction, count, triton.__version__
    return tuple(map(str, figures))


def _read_nvidia(compiled: CompiledKernel) -> tuple[int, int, list[str]]:
    """Registers, bytes of stack and the tensor-core instructions of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage"]
        if "mma." in compiled.asm["ptx"]:  # disassembling takes its time
            command.append("-sass")
        dump = subprocess.check_output([*command, file.name], text=True)
    registers, stack = (int(re.search(rf"{n}:(\d+)", dump)[1]) for n in ("REG", "STACK"))
    return registers, stack, TENSOR_CORE.findall(dump)


def _read_amd(compiled: CompiledKernel) -> tuple[int, int, list[str]]:
    """As ``_read_nvidia``: vector registers and accumulators, scratch memory with its spills."""
    assembly = compiled.asm["amdgcn"]
    registers, scratch, spilled = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, scratch + 4 * spilled, TENSOR_CORE.findall(assembly)


def compile_all(everything: bool, processes: int) -> list[dict[str, str]]:
    """Rows of every shipped configuration, sorted; each process compiles a case at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        rows = {
            tuple(row[name] for name in KEY): row
            for found in pool.map(compile_case, cases(everything))
            for row in found
        }
    return [rows[key] for key in sorted(rows)]


def problems(rows: Iterable[dict[str, str]]) -> list[str]:
    """What breaks a gate: a stack, too much shared memory, or no tensor core where one is meant."""
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
    return found


def uses_tensor_cores(row: dict[str, str]) -> bool:
    """Whether a kernel is meant to: products do, but those of fp32 in full on NVIDIA's."""
    if "PRECISION" not in row["configuration"]:
        return False
    of_half = row["dtype"] != "fp32" and row["kernel"] in OF_FEATURES
    return of_half or "PRECISION=ieee" not in row["configuration"] or row["target"] == "gfx942"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="PATH", help="CSV file instead of a print")
    parser.add_argument(
        "--shipped-only", action="store_true", help="each tile once, in its commonest use"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if em_attention.INTERPRETED:
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
