"""Tensors that a file describes. They are checked first, then made in the memory of the file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from emanet_triton.models.checkpoint_files.refusals import DamagedError, shown

# Names of dtypes as PyTorch spells them.
DTYPES_BY_NAME: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}
DIMENSIONS = 25  # more than any weight has
LARGEST = 1 << 48  # bound of sizes, strides and offsets


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a file that tensors share.

    Attributes:
        key: its name in the file.
        dtype: of its elements.
        numel: number of elements.
        root: the storage of which this storage is a part, or ``None``.
        first: number of the root's elements before this part.
    """

    key: str
    dtype: torch.dtype
    numel: int
    root: "Storage | None" = None
    first: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies inside a storage.

    Attributes:
        storage: the storage that holds the tensor's elements.
        dtype: of its elements.
        offset: number of the storage's elements before the tensor's first element.
        shape: its sizes.
        stride: for each dimension, elements from one index to the next.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes if no two elements share memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """The content of a file, before any tensor is made.

    Attributes:
        value: lists, dicts, texts, numbers, ``StoredTensor`` and ``Inert`` objects.
        begins: first byte of each storage that is no part of another one.
        meta: texts and numbers that describe the file.
        spare: bytes before every storage that belong to no storage.
    """

    value: Any
    begins: Mapping[str, int]
    meta: dict[str, Any]
    spare: int


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    steps = accumulate(reversed(shape), mul, initial=1)
    return tuple(steps)[-2::-1]


def stored_tensor(
    storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any
) -> StoredTensor:
    """Check that a tensor lies inside its storage.

    If the storage is a part of another one, the tensor that is returned lies in the other one.

    Raises:
        DamagedError: the tensor reaches beyond its storage, or its sizes are impossible.
    """
    key = shown(storage.key)
    tuples = type(shape) is tuple and type(stride) is tuple
    if not tuples or len(shape) != len(stride) or len(shape) > DIMENSIONS:
        raise DamagedError(f"a tensor of storage {key} has no usable shape")
    if not all(type(n) is int and 0 <= n < LARGEST for n in (offset, *shape, *stride)):
        raise DamagedError(f"a tensor of storage {key} has impossible sizes")
    tensor = StoredTensor(storage, dtype, offset, shape, stride)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if tensor.nbytes and end * dtype.itemsize > storage.nbytes:
        raise DamagedError(f"a tensor of storage {key} reaches beyond it")
    if storage.root is None:
        return tensor
    elements, rest = divmod(storage.first * storage.dtype.itemsize, dtype.itemsize)
    if rest:
        raise DamagedError(f"a tensor of storage {key} begins inside an element")
    return replace(tensor, storage=storage.root, offset=elements + offset)


def make(
    data: memoryview, content: Content, tensors: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """Make the tensors on the CPU, in the memory of ``data``."""
    alignments: dict[str, int] = {}
    for tensor in tensors.values():
        known = alignments.get(tensor.storage.key, 1)
        alignments[tensor.storage.key] = max(known, tensor.dtype.itemsize)
    storages: dict[str, torch.UntypedStorage] = {}
    made = {}
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in storages:
            part = range(content.begins[key], content.begins[key] + tensor.storage.nbytes)
            storages[key] = _storage(data, part, alignments[key], content.spare)
        empty = torch.empty(0, dtype=tensor.dtype, device="cpu")
        offset = tensor.offset if tensor.nbytes else 0
        made[name] = empty.set_(storages[key], offset, tensor.shape, tensor.stride)
    return made


def _storage(data: memoryview, part: range, alignment: int, spare: int) -> torch.UntypedStorage:
    """A storage in a part of ``data``, moved if its elements are not aligned.

    Kernels rely on aligned elements. The bytes before a storage of a PyTorch file are no longer
    needed, so the storage can move there by a few bytes, which needs no memory for a copy.
    """
    if not part:
        return torch.UntypedStorage(0, device="cpu")
    here = torch.frombuffer(data, dtype=torch.uint8, count=len(part), offset=part.start)
    shift = here.data_ptr() % alignment
    if shift == 0:
        return here.untyped_storage()
    if shift > spare:
        return here.clone().untyped_storage()
    start = part.start - shift
    data[start : start + len(part)] = data[part.start : part.stop]
    moved = torch.frombuffer(data, dtype=torch.uint8, count=len(part), offset=start)
    return moved.untyped_storage()
