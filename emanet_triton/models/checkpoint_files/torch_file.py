"""Reading the files of ``torch.save``, zip and legacy, without running any code in them."""

import io
import pickle  # for the opcodes' names
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import torch

from emanet_triton.models.checkpoint_files.inert import Global, Inert
from emanet_triton.models.checkpoint_files.pickled import Unpickler, apply
from emanet_triton.models.checkpoint_files.refusals import (
    SAVE_WEIGHTS,
    DamagedError,
    UnsupportedError,
    shown,
)
from emanet_triton.models.checkpoint_files.stored import (
    DTYPES_BY_NAME,
    LARGEST,
    Content,
    Storage,
    StoredTensor,
    stored_tensor,
)
from emanet_triton.models.checkpoint_files.zip_file import entries_of, intact_parts

_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a legacy file
_MAGIC_LONG = pickle.LONG1 + b"\x0a" + _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001  # second pickle
_NUMEL = struct.Struct("<q")  # before each storage of a legacy file
_SPARE = 8  # bytes of a header before each storage, in both formats
_PICKLE = 1 << 24  # most bytes of a pickle read for its metadata; ResNet-101's has 100,000
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_EXPORTED = ("/models/model.json", "serialized_exported_program.json")
_CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")


def read_zip_file(data: memoryview) -> Content:
    """Read the format of PyTorch 1.6 and later.

    Raises:
        DamagedError, DangerousError: the file is damaged, or names a dangerous function.
        UnsupportedError: ``torch.jit.save`` or ``torch.export.save`` made the file, it is a zip
            around other files, or it has no CRCs.
    """
    entries = entries_of(data)
    _check_names(entries)  # first, because its messages say more than "is compressed"
    parts = intact_parts(data, entries)
    folders = [name.removesuffix("/data.pkl") for name in parts if name.endswith("/data.pkl")]
    folders = [folder for folder in folders if "/" not in folder]
    if len(folders) != 1:
        raise DamagedError("its zip is not one of torch.save")
    (folder,) = folders
    order = parts.get(f"{folder}/byteorder")
    if order is not None and bytes(data[order.start : order.stop]) != b"little":
        raise UnsupportedError(f"is of a big-endian machine: {SAVE_WEIGHTS}")
    storages: dict[str, Storage] = {}
    pickled = parts[f"{folder}/data.pkl"]
    persistent = _persistent(storages)
    value = Unpickler(data[: pickled.stop], pickled.start, _BUILDERS, persistent).load()
    begins = {}
    for key, storage in storages.items():
        part = parts.get(f"{folder}/data/{key}")
        if part is None:
            raise DamagedError(f"storage {shown(key)} is missing")
        if len(part) // storage.dtype.itemsize != storage.numel:
            raise DamagedError(f"storage {shown(key)} has another size than it claims")
        begins[key] = part.start
    return Content(value, begins, _meta(value), _SPARE)


def metadata_in_zip(file: io.RawIOBase) -> dict[str, Any]:
    """The texts and numbers under ``meta`` in a file of PyTorch 1.6 and later.

    Only the zip's directory and the pickle are read, not the weights.

    Raises:
        ValueError: the file is damaged or dangerous, or no file of ``torch.save``.
    """
    try:
        with zipfile.ZipFile(file) as zipped:
            (entry,) = (e for e in zipped.infolist() if e.filename.endswith("/data.pkl"))
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _PICKLE:
                raise DamagedError("its pickle is compressed or too large")
            pickled = zipped.read(entry)
    except (zipfile.BadZipFile, RuntimeError, EOFError, OverflowError, struct.error) as error:
        raise DamagedError(str(error)) from error
    return _meta(Unpickler(memoryview(pickled), 0, _BUILDERS, _persistent({})).load())


def _check_names(names: Iterable[str]) -> None:
    """Refuse zips that are no checkpoints, by the names in them."""
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UnsupportedError(
            "is TorchScript, a program with weights; expected weights alone: "
            "torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    if any(name.endswith(_EXPORTED) for name in names):
        raise UnsupportedError(
            "is of torch.export, a program with weights; expected weights alone: "
            "torch.save(torch.export.load(...).state_dict, ...)"
        )
    inside = [name for name in names if name.endswith(_CHECKPOINTS)]
    if inside and not any(name.endswith("/data.pkl") for name in names):
        raise UnsupportedError(
            f"is a zip that holds {shown(inside[0])}; expected a checkpoint itself: unpack it"
        )


def is_legacy_file(head: bytes) -> bool:
    """Whether a pickle with these first bytes is the first pickle of a legacy file."""
    return _MAGIC_LONG in head[:32]


def read_legacy_file(data: memoryview) -> Content:
    """Read the format before PyTorch 1.6: pickles, then the storages one after the other.

    Raises:
        DamagedError, DangerousError: the file is damaged, or names a dangerous function.
        UnsupportedError: the file is of a big-endian machine.
    """
    storages: dict[str, Storage] = {}
    unpickler = Unpickler(data, 0, _BUILDERS, _persistent(storages))
    if unpickler.load() != _MAGIC:
        raise DamagedError("it does not begin like a file of torch.save")
    version, machine = unpickler.load(), unpickler.load()
    if version != _PROTOCOL or not isinstance(machine, dict):
        raise DamagedError("it has an unknown version")
    if machine.get("little_endian") is not True:
        raise UnsupportedError(f"is of a big-endian machine: {SAVE_WEIGHTS}")
    value = unpickler.load()
    begins = _legacy_storages(unpickler, storages)
    return Content(value, begins, _meta(value), _SPARE)


def _legacy_storages(unpickler: Unpickler, storages: dict[str, Storage]) -> dict[str, int]:
    """First byte of each storage that is no part of another one."""
    keys = unpickler.load()
    stored = {key for key, storage in storages.items() if storage.root is None}
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise DamagedError("it has no list of storages")
    if len(keys) != len(stored) or set(keys) != stored:
        raise DamagedError("its list of storages does not name those of its tensors")
    begins = {}
    for key in keys:
        (numel,) = _NUMEL.unpack(unpickler.take(_NUMEL.size))
        if numel != storages[key].numel:
            raise DamagedError(f"storage {shown(key)} has another size than it claims")
        begins[key] = unpickler.position
        unpickler.take(storages[key].nbytes)
    return begins


def _persistent(storages: dict[str, Storage]) -> Callable[[object], object]:
    """Returns a function from persistent ids to storages, which notes the storages in the dict."""

    def load(identity: object) -> object:
        if type(identity) is not tuple or not identity:
            raise DamagedError("it has a strange storage")
        kind, *rest = identity
        if kind == "module":  # a whole module in a legacy file: its class and source
            return rest[0]
        if kind != "storage" or len(rest) not in (4, 5):
            raise DamagedError("it has a strange storage")
        kind_of_storage, key, _, numel, *view = rest
        dtype = _storage_dtype(kind_of_storage)
        if dtype is None:
            return Inert("torch.Storage")
        storage = _declare(storages, key, dtype, numel)
        if not view or view[0] is None:
            return storage
        key, first, numel = view[0]  # a part of the storage, as PyTorch before 1.0 wrote it
        return _declare(storages, key, dtype, numel, storage, first)

    return load


def _declare(
    storages: dict[str, Storage],
    key: object,
    dtype: torch.dtype,
    numel: Any,
    root: Storage | None = None,
    first: Any = 0,
) -> Storage:
    """Note a storage. If it was noted before, the description must be the same."""
    if type(key) is not str or not all(type(n) is int and 0 <= n < LARGEST for n in (numel, first)):
        raise DamagedError("it has a strange storage")
    if root is not None and (root.root is not None or first + numel > root.numel):
        raise DamagedError(f"storage {shown(key)} is no part of another one")
    storage = Storage(key, dtype, numel, root, first)
    if storages.setdefault(key, storage) != storage:
        raise DamagedError(f"storage {shown(key)} is described in two ways")
    return storage


def _storage_dtype(kind: object) -> torch.dtype | None:
    """The dtype of a storage class; ``None`` for quantised and unknown classes."""
    if not isinstance(kind, Global) or not kind.path.startswith("torch."):
        return None
    return DTYPES_BY_NAME.get(_STORAGES.get(kind.path.rpartition(".")[2], ""))


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = None,
    hooks: object = None,
    flags: object = None,
) -> StoredTensor | Inert:
    """``_rebuild_tensor`` and, with gradient, hooks and flags, ``_rebuild_tensor_v2``."""
    return _typed_tensor(storage, offset, shape, stride, requires_grad, hooks, None, flags)


def _typed_tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = None,
    hooks: object = None,
    dtype: object = None,
    flags: object = None,
) -> StoredTensor | Inert:
    """``_rebuild_tensor_v3``, whose storages are bytes. Flags mark negated or conjugate views."""
    if not isinstance(storage, Storage) or flags:
        return Inert("torch.Tensor")
    element: torch.dtype | None = storage.dtype
    if dtype is not None:
        path = dtype.path if isinstance(dtype, Global) else ""
        element = DTYPES_BY_NAME.get(path.removeprefix("torch."))
    if element is None:
        return Inert("torch.Tensor")
    return stored_tensor(storage, element, offset, shape, stride)


def _first(data: object = None, *_: object) -> object:
    """The first argument: the tensor of a parameter, or the tuple of a ``torch.Size``."""
    return data


def _of_type(function: object, kind: object, arguments: object, state: object) -> object:
    """A tensor of a subclass, or a tensor with attributes, is read as a plain tensor."""
    builder = _TENSORS.get(function.path) if isinstance(function, Global) else None
    return Inert("torch.Tensor") if builder is None else apply(builder, arguments)


def _meta(value: object) -> dict[str, Any]:
    """The texts and numbers under ``meta``, by which mmcv and mmengine describe a file."""
    meta = value.get("meta") if isinstance(value, dict) else None
    items = meta.items() if isinstance(meta, dict) else ()
    return {k: v for k, v in items if isinstance(k, str) and isinstance(v, str | int | float)}


_TENSORS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
}
_BUILDERS: dict[str, Callable[..., object]] = _TENSORS | {
    "torch.Size": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._tensor._rebuild_from_type": _of_type,
    "torch.tensor._rebuild_from_type": _of_type,
}
