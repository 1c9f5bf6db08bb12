"""Read a compiled kernel: registers, stack, tensor-core instructions, width of its loads."""

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
    """What the gates look at.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, spilled registers included.
        shared: bytes of a program.
        tensor_core, count: the commonest tensor-core instruction, and how many there are.
        waits: for tensor-core instructions, on sm_90.
        load, full_load: of the load with the smallest ``load / full_load``: the bytes that a
            thread loads at once, and the bytes that the tile would allow. Scalars and tiles that
            a descriptor loads do not count.
    """

    registers: int
    stack: int
    shared: int
    tensor_core: str
    count: int
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
    # Disassembling takes its time.
    options = ("-sass",) if "mma." in compiled.asm["ptx"] else ()
    dump = dumped(compiled.asm["cubin"], *options)
    waits = dump.count("WARPGROUP.DEPBAR")
    return *resources(dump), TENSOR_CORE.findall(dump), waits


def dumped(cubin: bytes, *options: str) -> str:
    """What cuobjdump says of the resources of a kernel, and by options more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", *options]
        done = subprocess.run([*command, file.name], check=True, capture_output=True, text=True)
    return done.stdout


def resources(dump: str) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from what cuobjdump says."""
    registers, stack = (int(re.search(rf"{n}:(\d+)", dump)[1]) for n in ("REG", "STACK"))
    return registers, stack


def _read_amd(compiled: CompiledKernel) -> tuple[int, int, list[str], int]:
    """As ``_read_nvidia``: vector registers and accumulators, scratch memory with its spills."""
    assembly = compiled.asm["amdgcn"]
    registers, scratch, spilled = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
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
    for place, elements, itemsize in _loaded_tiles(compiled.asm["ttir"]):
        if place in widths:
            full = min(WIDEST_LOAD, max(itemsize, elements * itemsize // threads))
            found.append((min(widths[place], full), full))
    return min(found, key=lambda pair: (pair[0] / pair[1], -pair[1]), default=(0, 0))


_TILE = re.compile(r"tt\.load .* : tensor<([\dx]+)x!tt\.ptr<[a-z]+(\d+)\w*>> loc\((#loc\d*)\)")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.MULTILINE)


def _loaded_tiles(ttir: str) -> Iterator[tuple[Place, int, int]]:
    """Of every load of a tile in Triton's code: its place, its elements, bytes of one of them."""
    locations = dict(_LOCATION.findall(ttir))
    for shape, bits, name in _TILE.findall(ttir):
        yield _place(name, locations), math.prod(map(int, shape.split("x"))), int(bits) // 8


def _place(name: str, locations: dict[str, str]) -> Place:
    """File, line and column of a location; of a call those of the innermost function."""
    text = locations[name]
    inner = re.search(r"#loc\d*", text)
    if inner:
        return _place(inner[0], locations)
    path, line, column = re.fullmatch(r'"(.*)":(\d+):(\d+)', text).groups()
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
            # LLVM numbers the lines of inline assembly on from its first, which alone is right.
            place, held = place if held else found[1], inline
        elif found := is_load.search(line):
            yield place, _nvidia_bytes(*found.groups()) if nvidia else _amd_bytes(*found.groups())


def _nvidia_bytes(vector: str | None, bits: str | None, copied: str | None) -> int:
    return int(copied, 16) if copied else int(vector or 1) * int(bits) // 8


def _amd_bytes(kind: str, vector: str | None) -> int:
    return _AMD_BYTES[kind] * int(vector or 1)
