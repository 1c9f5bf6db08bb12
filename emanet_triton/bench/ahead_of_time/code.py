"""Read a compiled kernel: registers, stack, tensor-core instructions, width of loads."""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|v_mfma)")
WIDEST_LOAD = 16  # bytes that one load instruction of a thread can bring

Place = str  # file:line:column


class Figures(NamedTuple):
    """Figures of a compiled kernel that the gates check.

    Attributes:
        registers: registers of a thread.
        stack: bytes of stack of a thread, spilled registers included.
        shared: bytes of shared memory of a program.
        tensor_core, count: the most frequent tensor-core instruction, and how many there are.
        waits: how many instructions wait for tensor cores, on sm_90.
        load, full_load: bytes that a thread loads at once, and the bytes that the tile would allow,
            for the load with the smallest ``load / full_load``. Scalars and tiles that a descriptor
            loads do not count.
    """

    registers: int
    stack: int
    shared: int
    tensor_core: str
    count: int  # type: ignore[assignment]  # hides tuple.count
    waits: int
    load: int
    full_load: int


def figures(compiled: CompiledKernel) -> Figures:
    """Read the binary of a kernel, without a GPU."""
    read = _read_nvidia if "cubin" in compiled.asm else _read_amd
    registers, stack, instructions, waits = read(compiled)
    [(instruction, count)] = Counter(instructions).most_common(1) or [("", 0)]
    instruction = instruction.removeprefix("v_").upper()
    shared = compiled.metadata.shared
    return Figures(registers, stack, shared, instruction, count, waits, *narrowest_load(compiled))


def _read_nvidia(compiled: CompiledKernel) -> tuple[int, int, list[str], int]:
    """Registers, bytes of stack, the tensor-core instructions and sm_90's waits for them."""
    # Disassembling takes long, so it is done for kernels with tensor-core instructions only.
    options = ("-sass",) if "mma." in compiled.asm["ptx"] else ()
    dump = dumped(compiled.asm["cubin"], *options)
    waits = dump.count("WARPGROUP.DEPBAR")
    return *resources(dump), TENSOR_CORE.findall(dump), waits


def dumped(cubin: bytes, *options: str) -> str:
    """What cuobjdump prints about the resources of a kernel; options make it print more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *options]
        done = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    return done.stdout


def resources(dump: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from the output of cuobjdump."""
    registers, stack = (int(re.findall(rf"{n}:(\d+)", dump)[0]) for n in ("REG", "STACK"))
    return registers, stack


def _read_amd(compiled: CompiledKernel) -> tuple[int, int, list[str], int]:
    """As ``_read_nvidia``: vector registers and accumulators, scratch memory with its spills."""
    assembly = compiled.asm["amdgcn"]
    registers, scratch, spilled = (
        int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])
        for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
    )
    return registers, scratch + 4 * spilled, TENSOR_CORE.findall(assembly), 0


def narrowest_load(compiled: CompiledKernel) -> tuple[int, int]:
    """``load`` and ``full_load`` of ``Figures``; both 0 where no tile is loaded."""
    metadata = compiled.metadata
    threads = metadata.num_warps * metadata.target.warp_size
    widths: dict[Place, int] = {}
    for place, width in _load_instructions(compiled):
        widths[place] = min(width, widths.get(place, width))
    found = []
    # A kernel in Gluon has no such code. Descriptors load its tiles.
    for place, elements, itemsize in _loaded_tiles(compiled.asm.get("ttir", "")):
        if place in widths:
            full = min(WIDEST_LOAD, max(itemsize, elements * itemsize // threads))
            found.append((min(widths[place], full), full))
    return min(found, key=lambda pair: (pair[0] / pair[1], -pair[1]), default=(0, 0))


_TILE = re.compile(r"tt\.load .* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)\w*>> loc\((#loc\d*)\)")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)


def _loaded_tiles(ttir: str) -> Iterator[tuple[Place, int, int]]:
    """For every load of a tile in Triton's code: place, number of elements, bytes of an element."""
    locations = dict(_LOCATION.findall(ttir))
    for shape, bits, name in _TILE.findall(ttir):
        yield _place(name, locations), math.prod(map(int, shape.split("x"))), int(bits) // 8


def _place(name: str, locations: dict[str, str]) -> Place:
    """File, line and column of a location; for a call, those inside the called function."""
    text = locations[name]
    inner = re.search(r"#loc\d*", text)
    if inner:
        return _place(inner[0], locations)
    [(path, line, column)] = re.findall(r'^"(.*)":(\d+):(\d+)$', text)
    return f"{path.rpartition('/')[2]}:{line}:{column}"


_NVIDIA_LOAD = re.compile(
    r"ld\.global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    r"|cp\.async\.c[ag]\.shared\.global.*?\], \[.*?\], (0x\w+)"
)
_AMD_LOAD = re.compile(r"(?:global|buffer|flat)_load_(?:lds_)?([a-z]+?)(?:x(\d))?[\s_]")
_AMD_BYTES = {"dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
_NVIDIA_PLACE = re.compile(r"\.loc\s.*//\s(\S+:\d+:\d+)")
_AMD_PLACE = re.compile(r"\.loc\s.*;\s(\S+:\d+:\d+)")


def _load_instructions(compiled: CompiledKernel) -> Iterator[tuple[Place, int]]:
    """Place and bytes of every instruction that loads from global memory."""
    nvidia = "ptx" in compiled.asm
    is_place, is_load = (_NVIDIA_PLACE, _NVIDIA_LOAD) if nvidia else (_AMD_PLACE, _AMD_LOAD)
    place, inline, held = "", False, False
    for line in compiled.asm["ptx" if nvidia else "amdgcn"].splitlines():
        if "inline asm" in line:
            inline, held = "begin" in line, False
        elif found := is_place.search(line):
            # LLVM counts lines on within inline assembly, so only the first of its places is right.
            place, held = place if held else found[1], inline
        elif found := is_load.search(line):
            groups = found.groups(default="")
            yield place, _nvidia_bytes(*groups) if nvidia else _amd_bytes(*groups)


def _nvidia_bytes(vector: str, bits: str, copied: str) -> int:
    return int(copied, 16) if copied else int(vector or 1) * int(bits) // 8


def _amd_bytes(kind: str, vector: str) -> int:
    return _AMD_BYTES[kind] * int(vector or 1)
