"""Reading the files of ``paddle.save``, pickles of NumPy arrays, without running any code in them.

A file is one pickle of a dict from names to arrays. Protocols 3 to 5 store the bytes of an array.
Protocol 2 stores a text whose characters are these bytes (Latin-1); the file holds it as UTF-8, in
which each byte from 128 takes two. Sources: ``paddle/framework/io.py`` of PaddlePaddle 3.3.1, and
the methods ``__reduce__`` of ``numpy.ndarray`` and ``numpy.dtype``.
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from emanet_triton.models.checkpoint_files.inert import Global, Inert
from emanet_triton.models.checkpoint_files.pickled import Unpickler
from emanet_triton.models.checkpoint_files.refusals import (
    SAVE_WEIGHTS,
    DamagedError,
    UnsupportedError,
)
from emanet_triton.models.checkpoint_files.stored import (
    DIMENSIONS,
    Content,
    Storage,
    StoredTensor,
    stored_tensor,
    strides_of,
)

_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "u2": torch.bfloat16,  # NumPy lacks bfloat16: Paddle writes and reads it as uint16
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
_SPARE = 2  # bytes of opcode and length before each array, at least
_LONGEST_NAME = 512  # bytes; a longer text is no name, but the bytes of an array
_STEPS = 16  # a text, bytes or an array counts as so many opcodes, because it takes as long
_CHUNK = 1 << 20  # bytes of a text that are decoded at once
_SPLIT = "UnpackBigParamInfor@@"  # Paddle's spelling
_SCHEDULE = "LR_Scheduler"
_ACCUMULATOR = re.compile(r".+\.[wb]_\d+_\w+_\d+")  # an optimizer's, such as conv2d_0.w_0_moment1_0


def read_pdparams_file(data: memoryview) -> Content:
    """Read a pickle of NumPy arrays. Texts that are the bytes of arrays are decoded in ``data``.

    Arrays of objects, texts, records and unknown numbers become ``Inert`` objects. ``uint16``
    becomes ``bfloat16``, as Paddle means it.

    Raises:
        DamagedError, DangerousError: the file is damaged, or names a dangerous function.
        UnsupportedError: the file holds no arrays, big-endian arrays, split arrays, or the state
            of an optimizer.
    """
    unpickler = _Unpickler(data)
    value = unpickler.load()
    if not unpickler.begins:
        raise UnsupportedError(
            f"is a pickle, but not one of torch.save or paddle.save: {SAVE_WEIGHTS}"
        )
    if unpickler.position != len(data):
        raise DamagedError(f"{len(data) - unpickler.position} bytes follow its pickle")
    _set_tensors(value)
    if isinstance(value, dict):
        _check_names(value)
    return Content(value, unpickler.begins, {}, _SPARE)


class _Text(str):
    """A text and its place in the file, because it may be the bytes of an array.

    Attributes:
        start: its first byte in the file.
        size: its bytes in the file.
    """

    __slots__ = ("size", "start")
    start: int
    size: int


class _Bytes(Inert):
    """A place in the file, with the bytes of an array."""

    __slots__ = ("size", "start")

    def __init__(self, start: int, size: int) -> None:
        super().__init__("bytes")
        self.start = start
        self.size = size


class _LongText(_Bytes):
    """A text that is too long for a name, before it is decoded."""

    __slots__ = ()


class _DType(Inert):
    """A dtype of NumPy; ``element`` is ``None`` if no weight has this dtype."""

    __slots__ = ("element", "order")

    def __init__(self, element: torch.dtype | None) -> None:
        super().__init__("numpy.dtype")
        self.element = element
        self.order = "<"


class _Array(Inert):
    """An array of NumPy. A pickle makes it first and sets its content afterwards."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: StoredTensor | None = None) -> None:
        super().__init__("numpy.ndarray")
        self.tensor = tensor


class _Unpickler(Unpickler):
    """Reads arrays of NumPy as ``_Array`` objects.

    Attributes:
        begins: first byte of each storage.
    """

    def __init__(self, data: memoryview) -> None:
        builders: dict[str, Callable[..., object]] = {
            "_codecs.encode": self._encoded,
            "__builtin__.bytes": _no_bytes,
            "builtins.bytes": _no_bytes,
            "__builtin__.tuple": _tuple,
            "builtins.tuple": _tuple,
            "numpy.dtype": _dtype,
        }
        for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
            builders[f"{core}.multiarray._reconstruct"] = _reconstructed
            builders[f"{core}.numeric._frombuffer"] = self._from_buffer
        super().__init__(data, 0, builders, _persistent)
        self.begins: dict[str, int] = {}
        self.decoded: dict[int, _Bytes] = {}

    def text(self, part: memoryview, errors: str) -> object:
        self.spend(_STEPS)
        start = self.position - len(part)
        if len(part) > _LONGEST_NAME:
            return _LongText(start, len(part))
        text = _Text(super().text(part, errors))
        text.start, text.size = start, len(part)
        return text

    def raw(self, part: memoryview) -> object:
        self.spend(_STEPS)
        return _Bytes(self.position - len(part), len(part))

    def build(self, target: object, state: Any) -> None:
        if isinstance(target, _Array):
            _, shape, dtype, is_fortran, raw = state
            target.tensor = self._tensor(raw, dtype, shape, bool(is_fortran))
        elif isinstance(target, _DType):
            target.order = state[1]
        else:
            super().build(target, state)

    def _encoded(self, text: object, encoding: object) -> _Bytes:
        """``codecs.encode``. A text may be encoded again; its place holds its bytes by then."""
        if not isinstance(text, _Text | _LongText) or encoding != "latin1":
            raise TypeError("not the text of an array")
        if text.start not in self.decoded:
            size = _decode(self.data[text.start : text.start + text.size])
            self.decoded[text.start] = _Bytes(text.start, size)
        return self.decoded[text.start]

    def _from_buffer(self, raw: object, dtype: object, shape: object, order: object) -> _Array:
        """``_frombuffer``, by which protocol 5 makes arrays."""
        if order not in ("C", "F"):
            raise TypeError("an unknown order of elements")
        return _Array(self._tensor(raw, dtype, shape, order == "F"))

    def _tensor(
        self, raw: object, dtype: object, shape: Any, is_fortran: bool
    ) -> StoredTensor | None:
        self.spend(_STEPS)
        if not isinstance(dtype, _DType) or type(shape) is not tuple:
            raise TypeError("not the state of an array")
        if dtype.element is None:
            return None
        if dtype.order not in ("<", "|"):
            raise UnsupportedError(f"is of a big-endian machine: {SAVE_WEIGHTS}")
        if type(raw) is not _Bytes or len(shape) > DIMENSIONS:
            raise TypeError("not the state of an array")
        if not all(type(n) is int for n in shape):
            raise TypeError("not the shape of an array")
        strides = strides_of(shape[::-1])[::-1] if is_fortran else strides_of(shape)
        storage = Storage(str(raw.start), torch.uint8, raw.size)
        tensor = stored_tensor(storage, dtype.element, 0, shape, strides)
        if tensor.nbytes != raw.size:
            raise DamagedError(f"the array at byte {raw.start} has another size than it claims")
        self.begins[storage.key] = raw.start
        return tensor


def _decode(part: memoryview) -> int:
    """Turn UTF-8 into Latin-1 in place; returns the number of bytes, which are the first ones.

    Raises:
        ValueError: it is no UTF-8, or a character is none of Latin-1.
    """
    filled = start = 0
    while start < len(part):
        stop = min(start + _CHUNK, len(part))
        if stop < len(part) and part[stop] & 0xC0 == 0x80:  # the second byte of a character
            stop += 1
        piece = str(part[start:stop], "utf-8").encode("latin-1")
        part[filled : filled + len(piece)] = piece
        filled, start = filled + len(piece), stop
    return filled


def _no_bytes() -> _Bytes:
    """``bytes()``, which protocol 2 calls for an empty array."""
    return _Bytes(0, 0)


def _tuple(items: object) -> object:
    """``tuple``, which paddle.save calls for a tensor in a nested dict: (name, array)."""
    if type(items) is not tuple:
        raise TypeError("not a tuple")
    return items


def _dtype(name: object, *_: object) -> _DType:
    return _DType(_DTYPES.get(name) if isinstance(name, str) else None)


def _reconstructed(kind: object, *_: object) -> Inert:
    """``_reconstruct``, which makes an array without content."""
    is_array = isinstance(kind, Global) and kind.path == "numpy.ndarray"
    return _Array() if is_array else Inert("numpy.ndarray")


def _persistent(identity: object) -> object:
    """An object outside of the pickle, which no file of paddle.save has."""
    return Inert("persistent")


def _set_tensors(value: object) -> None:
    """Put tensors in the place of arrays, in nested dicts as well."""
    dicts, seen = [value], {id(value)}
    while dicts:
        entries = dicts.pop()
        if not isinstance(entries, dict):
            continue
        for key, entry in entries.items():
            if type(entry) is tuple and len(entry) == 2:  # name and array
                entry = entry[1]
            if isinstance(entry, _Array) and entry.tensor is not None:
                entries[key] = entry.tensor
            elif isinstance(entry, dict) and id(entry) not in seen:
                seen.add(id(entry))
                dicts.append(entry)


def _check_names(entries: dict[Any, Any]) -> None:
    """Refuse split parameters and optimizers."""
    if _SPLIT in entries:
        raise UnsupportedError(
            "holds a parameter of more than 1 GiB in parts; expected whole parameters: "
            "paddle.save(model.state_dict(), ..., protocol=4)"
        )
    names = [key for key in entries if isinstance(key, str)]
    if _SCHEDULE in entries or any(map(_ACCUMULATOR.fullmatch, names)):
        raise UnsupportedError(
            "holds the state of an optimizer, as .pdopt files do; expected the weights of a "
            "network, usually in the .pdparams file beside it"
        )
