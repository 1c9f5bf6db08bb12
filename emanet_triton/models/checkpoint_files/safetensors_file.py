"""Reading and writing safetensors (https://github.com/huggingface/safetensors#format) in memory."""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emanet_triton.models.checkpoint_files.refusals import DamagedError, shown
from emanet_triton.models.checkpoint_files.stored import (
    DIMENSIONS,
    DTYPES_BY_NAME,
    Content,
    Storage,
    stored_tensor,
    strides_of,
)

_LENGTH = struct.Struct("<Q")  # the length of the header, which follows
_HEADER = 1 << 22  # most bytes of a header; the header of ResNet-101 takes 70,000
_METADATA = "__metadata__"
_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_DTYPES = {name: DTYPES_BY_NAME[torch_name] for name, torch_name in _NAMES.items()}
_SHORT_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of this size, with these first bytes, can be a safetensors file."""
    return head[8:9] == b"{" and _LENGTH.size + _LENGTH.unpack_from(head)[0] <= size


def read_safetensors_file(data: memoryview) -> Content:
    """Read the header and check that its tensors fill the rest of the file.

    Raises:
        DamagedError: the header is damaged, or the tensors do not fill the file.
    """
    start = header_end(data)
    header = _header(data[_LENGTH.size : start])
    meta = header.pop(_METADATA)
    tensors, begins, parts = {}, {}, []
    for key, entry in header.items():
        storage, shape, begin = _entry(key, entry)
        tensors[key] = stored_tensor(storage, storage.dtype, 0, shape, strides_of(shape))
        begins[key] = start + begin
        parts.append((begin, begin + storage.nbytes))
    end = 0
    for begin, stop in sorted(parts):
        if begin != end:
            raise DamagedError("its tensors do not lie one after the other")
        end = stop
    if start + end != len(data):
        raise DamagedError("its tensors do not end where the file does")
    return Content(tensors, begins, meta, spare=0)


def header_end(head: bytes | memoryview) -> int:
    """The number of bytes before the first tensor, from the first eight bytes of a file.

    Raises:
        DamagedError: the header is too long.
    """
    (length,) = _LENGTH.unpack_from(head)
    if length > _HEADER:
        raise DamagedError(f"its header is longer than {_HEADER} bytes")
    return _LENGTH.size + length


def metadata_in(head: bytes) -> dict[str, str]:
    """The metadata in the first ``header_end`` bytes of a file.

    Raises:
        DamagedError: the header is damaged.
    """
    return _header(head[_LENGTH.size :])[_METADATA]


def write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, its tensors in order of alignment and name."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _SHORT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([_LENGTH.pack(len(text)), text, *(_bytes(tensors[name]) for name in names)])


def _header(text: bytes | memoryview) -> dict[str, Any]:
    """The header; its metadata are checked, and empty if the file has none."""
    try:
        header = json.loads(str(text, "utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError("its header is no JSON") from error
    meta = header.setdefault(_METADATA, {})
    if not isinstance(meta, dict) or not all(isinstance(text, str) for text in meta.values()):
        raise DamagedError("its metadata are no texts")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise DamagedError("its header names something twice")
    return result


def _entry(key: str, entry: object) -> tuple[Storage, tuple[int, ...], int]:
    """Storage, shape and first byte of a tensor of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(f"the header describes {shown(key)} strangely")
    dtype, shape, offsets = (entry[name] for name in ("dtype", "shape", "data_offsets"))
    numbers = type(shape) is list and type(offsets) is list and len(offsets) == 2
    if not numbers or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise DamagedError(f"the header describes {shown(key)} strangely")
    if len(shape) > DIMENSIONS:
        raise DamagedError(f"{shown(key)} has more than {DIMENSIONS} dimensions")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DamagedError(f"the dtype of {shown(key)} is unknown")
    storage = Storage(key, _DTYPES[dtype], math.prod(shape))
    if storage.nbytes != offsets[1] - offsets[0]:
        raise DamagedError(f"{shown(key)} has another size than it claims")
    return storage, tuple(shape), offsets[0]


def _bytes(tensor: Tensor) -> memoryview:
    # ``view(torch.uint8)`` needs a last stride of 1. A contiguous tensor of one element may have
    # another stride, which ``view(-1)`` would keep.
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
