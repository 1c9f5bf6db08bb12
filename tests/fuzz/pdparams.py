"""Files of paddle.save, whole and damaged: opcodes, numbers, names, texts, bytes.

A whole file must give exactly its weights. If a damaged file is read, and Python's own
unpickler reads it as well, both must give the same weights.
"""

import codecs
import pickle
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.checkpoint import mutated, read_unless_refused, scratched, with_attack

DTYPES = ("f4", "f4", "f4", "f2", "f8", "i8", "i1", "u1", "b1", "u2")
NAMES = "StructuredToParameterName@@"


class ParameterTuple:
    """A tensor in a nested dict, which paddle.save reduces to (name, array)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self):
        return tuple, (("conv2d_0.w_0", self.array),)


class PlainDType:
    """What a pickle says of a dtype. NumPy itself would crash on some damaged states."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in DTYPES:
            raise pickle.UnpicklingError(name)
        self.name = name

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class PlainArray:
    """What a pickle says of an array."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.is_fortran, self.raw = state

    def array(self) -> np.ndarray:
        dtype, order = self.dtype.order + self.dtype.name, "F" if self.is_fortran else "C"
        array = np.ndarray(self.shape, dtype, self.raw, order=order)
        if array.nbytes != len(self.raw):
            raise pickle.UnpicklingError("another size")
        return array


def _from_buffer(raw: bytes, dtype: PlainDType, shape: tuple[int, ...], order: str) -> PlainArray:
    array = PlainArray()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


ALLOWED = {
    "_codecs.encode": codecs.encode,
    "builtins.bytes": bytes,
    "builtins.tuple": tuple,
    "numpy.dtype": PlainDType,
    "numpy.ndarray": PlainArray,
    "numpy._core.multiarray._reconstruct": PlainArray,
    "numpy._core.numeric._frombuffer": _from_buffer,
}


class PlainUnpickler(pickle._Unpickler):  # the one in C allocates as much as a file tells it to
    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}".replace("__builtin__", "builtins")
        return ALLOWED[path.replace("numpy.core", "numpy._core")]


def attempt(seed: int, folder: Path) -> str:
    rng = Random(seed)
    weights = _weights(rng)
    whole = rng.random() < 0.2
    protocol = rng.choice((2, 2, 3, 4, 4, 5))
    data = pickle.dumps(_dressed(rng, weights) if whole else weights, protocol)
    hostile = False
    if not whole:
        data, hostile = _damaged(rng, data)
    path = folder / "file.pdparams"
    path.write_bytes(data)
    read = read_unless_refused(path, whole)
    if read is None:
        return "refused"
    assert sum(value.nbytes for value in read.values()) <= len(data)
    if whole:
        assert list(read) == list(weights)
        _check(read, weights)
    elif not hostile:
        _check(read, _plain(data))
    return "right"


def _weights(rng: Random) -> dict[str, np.ndarray]:
    weights = {}
    for i in range(rng.randint(1, 5)):
        shape = [rng.randint(0, 5) for _ in range(rng.randint(0, 4))]
        values = np.random.RandomState(rng.randrange(2**31)).randint(0, 100, shape)
        weights[f"w{i}"] = np.asarray(values, rng.choice(DTYPES), rng.choice("CF"))
    if rng.random() < 0.3:
        size = rng.randint(100, 10_000)
        weights["long"] = np.frombuffer(rng.randbytes(size), np.uint8)
    return weights


def _dressed(rng: Random, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Weights as paddle.save writes them, alone or in a nested dict."""
    if rng.random() < 0.3:
        nested = {key: ParameterTuple(value) for key, value in weights.items()}
        return {"model": nested, "epoch": 3, "lr": np.float64(0.1), "text": "x" * 2000}
    return weights | {NAMES: {key: f"conv2d_{i}.w_0" for i, key in enumerate(weights)}}


def _damaged(rng: Random, data: bytes) -> tuple[bytes, bool]:
    """A damaged file, and whether an ordinary unpickler might need too much memory to read it."""
    kind = rng.random()
    if kind < 0.2:
        return scratched(rng, data), False
    if kind < 0.4:
        return with_attack(rng, data), True
    return mutated(rng, data), False


def _plain(data: bytes) -> dict[str, np.ndarray]:
    """The arrays that an ordinary unpickler reads; none if it fails, as it does in many ways."""
    try:
        content = PlainUnpickler(BytesIO(data)).load().items()
        return {key: entry.array() for key, entry in content if isinstance(entry, PlainArray)}
    except Exception:
        return {}


def _check(read: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> None:
    """All weights that both read are equal."""
    for key, value in read.items():
        if key in arrays:
            want = torch.from_numpy(arrays[key].copy())
            if want.dtype == torch.uint16:
                want = want.view(torch.bfloat16)
            assert value.dtype == want.dtype and torch.equal(value, want), key
