"""Reading checkpoints that nobody vouches for, and loading them strictly."""

import hashlib
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.files import write_whole

# What mmseg's training writes beside the weights. None of it is needed, and the real ones are
# not harmless: ``getattr`` reaches anything, and NumPy trusts the flags of a pickled dtype.
_INERT_GLOBALS = (
    "builtins.getattr",  # of HistoryBuffer: its statistics methods
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)
_ALLOW_LIST_LOCK = threading.Lock()  # torch keeps its allow-list per process
_PUBLISHED_NAME = re.compile(r".+-([0-9a-f]{8})\.pth")  # as mmcv's publish_model names files
_EXPECTED = "expected a PyTorch (.pth) or safetensors checkpoint"
_LISTED = 8


class _Inert:
    """Stands in for whatever ``_INERT_GLOBALS`` names: takes any arguments, keeps nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file and where they came from.

    Attributes:
        path: the file.
        sha256: of the whole file, 64 hex digits.
        state_dict: key to tensor on the CPU, without ``module.`` prefix, dtypes as stored; empty
            once released.
        meta: texts and numbers that the file says about itself: of mmseg files ``mmseg_version``,
            ``config``, ``iter`` and the like, of converted files ``source_sha256``; may be empty.
    """

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    meta: dict[str, Any]

    def release(self) -> None:
        """Let go of the weights. ``load_into`` reads the file again, which must be the same."""
        self.state_dict.clear()


def read_checkpoint(path: str | Path, sha256_prefix: str | None = None) -> Checkpoint:
    """Read a checkpoint that mmseg 0.x or 1.x wrote, or ``convert``.

    PyTorch files (legacy and zip) and safetensors, told apart by content; the weights under
    ``state_dict`` or bare. Nothing in the file is executed. Damage is always found in zip files,
    whose CRCs are verified, and in files whose hash is known.

    Args:
        path: the file.
        sha256_prefix: first hex digits that its SHA-256 must have. A file whose name has mmcv's
            published form ``*-<8 hex digits>.pth`` must match those digits as well.

    Raises:
        InputError: not a readable, undamaged, harmless file of finite weights with that hash.
    """
    path = Path(path)
    try:
        if not path.is_file():
            problem = "is not a file" if path.exists() else "no such file"
            raise InputError(f"{path}: {problem}; {_EXPECTED}")
        with path.open("rb") as file:
            read = _reader(path, file.read(512))
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            _check_hash(path, sha256, sha256_prefix)
            file.seek(0)
            state_dict, meta = read(file)
            _check_weights(path, state_dict)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the parsers raise anything
        raise InputError(f"{path}: {_reason(error)}; {_EXPECTED}") from error
    prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
    weights = {key.removeprefix(prefix): value.detach() for key, value in state_dict.items()}
    return Checkpoint(path, sha256, weights, meta)


def load_into(model: nn.Module, checkpoint: Checkpoint, share: bool = False) -> None:
    """Copy a checkpoint's weights into a model, all or nothing, cast to the model's dtypes.

    With ``share`` the checkpoint's own tensors become the model's instead, dtypes as stored; the
    model may then be on the meta device, without memory of its own.

    Raises:
        InputError: lists the keys that are missing, left over, or of another shape or kind of
            number; nothing is loaded then.
    """
    if not checkpoint.state_dict:
        checkpoint = read_checkpoint(checkpoint.path, checkpoint.sha256)
    ours, theirs = model.state_dict(), checkpoint.state_dict
    problems = {
        "missing from the file": [key for key in ours if key not in theirs],
        "left over in the file": [key for key in theirs if key not in ours],
        "of another shape or type": [
            f"{key}: {difference}"
            for key in ours
            if key in theirs and (difference := _difference(theirs[key], ours[key]))
        ],
    }
    if any(problems.values()):
        sections = [
            "\n  ".join([f"{title} ({len(lines)}):", *_cut(lines)])
            for title, lines in problems.items()
            if lines
        ]
        message = [f"{checkpoint.path}: does not fit the model", *sections, *_hints(theirs, ours)]
        raise InputError("\n".join(message))
    model.load_state_dict(theirs, assign=share)


def convert(source: str | Path, destination: str | Path, overwrite: bool = False) -> Checkpoint:
    """Write the weights of a checkpoint, and nothing else of it, as a safetensors file.

    The file's metadata name the source and its SHA-256.

    Returns:
        The written file, read back.

    Raises:
        InputError: the source is not a usable checkpoint, or the destination does not end in
            ``.safetensors``, cannot be written, or exists and ``overwrite`` is not set.
    """
    source, destination = Path(source), Path(destination)
    if destination.suffix != ".safetensors":
        raise InputError(f"{destination}: the converted file's name must end in .safetensors")
    checkpoint = read_checkpoint(source)
    tensors = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in checkpoint.state_dict.items()
    }
    metadata = {"format": "pt", "source": source.name, "source_sha256": checkpoint.sha256}
    try:
        if destination.exists() and not overwrite:
            raise InputError(
                f"{destination}: exists already; it is replaced only on request (--force)"
            )
        write_whole(destination, safetensors.torch.save(tensors, metadata))
    except OSError as error:
        raise InputError(f"{destination}: cannot be written: {error.strerror}") from error
    return read_checkpoint(destination)


def _reader(path: Path, head: bytes) -> Callable[[BinaryIO], tuple[object, dict[str, Any]]]:
    """Choose how to read a file by its first bytes."""
    if not head:
        raise InputError(f"{path}: is empty; {_EXPECTED}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise InputError(f"{path}: is a web page; {_EXPECTED}: download the file again")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip
    if head.startswith(b"\x80"):  # a pickle
        return _read_torch
    if head[8:9] == b"{":  # the JSON header, after its length
        return _read_safetensors
    raise InputError(f"{path}: is of no known format; {_EXPECTED}")


def _read_zip(file: BinaryIO) -> tuple[object, dict[str, Any]]:
    """Check what torch does not: that the entries are stored plainly, and their CRCs."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not plain or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its zip entries are compressed or claim more bytes than it has")
        if damaged := archive.testzip():
            raise ValueError(f"wrong CRC of {damaged}")
    file.seek(0)
    return _read_torch(file)


def _read_torch(file: BinaryIO) -> tuple[object, dict[str, Any]]:
    inert = [(_Inert, name) for name in _INERT_GLOBALS]
    with _ALLOW_LIST_LOCK, torch.serialization.safe_globals(inert):
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    if not isinstance(content, dict):
        raise ValueError("holds no state dict")
    meta = content.get("meta")
    plain = {
        key: value
        for key, value in (meta.items() if isinstance(meta, dict) else ())
        if isinstance(key, str) and isinstance(value, str | int | float)
    }
    return content.get("state_dict", content), plain


def _read_safetensors(file: BinaryIO) -> tuple[object, dict[str, Any]]:
    with safetensors.safe_open(file.name, framework="pt", device="cpu") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def _check_hash(path: Path, sha256: str, expected: str | None) -> None:
    if expected is not None and not sha256.startswith(expected):
        raise InputError(
            f"{path}: its SHA-256 begins with {sha256[: len(expected)]}, expected {expected}: "
            "the file is damaged or another one"
        )
    named = _PUBLISHED_NAME.fullmatch(path.name)
    if named and not sha256.startswith(named[1]):
        raise InputError(
            f"{path}: its SHA-256 begins with {sha256[:8]}, expected {named[1]} as in its name: "
            "the file is damaged, or the name must not end like a published one"
        )


def _check_weights(path: Path, state_dict: object) -> None:
    """Refuse a state dict that is not a non-empty mapping of names to finite tensors."""
    if not isinstance(state_dict, dict) or not state_dict:
        raise InputError(f"{path}: holds no weights; expected a state dict of tensors")
    others = [k for k, v in state_dict.items() if not (isinstance(k, str) and _is_tensor(v))]
    if others:
        raise InputError(
            f"{path}: expected a state dict of tensors, but {len(others)} of {len(state_dict)} "
            f"entries are something else, first {str(others[0])!r}"
        )
    size = path.stat().st_size
    for key, value in state_dict.items():
        if value.numel() * value.element_size() > size:
            raise InputError(f"{path}: {key} claims to be larger than the whole file")
    unusable = [key for key, value in state_dict.items() if not value.isfinite().all()]
    if unusable:
        raise InputError(
            f"{path}: expected finite weights, but {len(unusable)} of {len(state_dict)} tensors "
            f"hold NaN or infinity, first {unusable[0]}"
        )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _reason(error: Exception) -> str:
    """Say in one line why a file could not be parsed, without torch's advice to trust it."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return f"asks to run {refused[1]}, which no checkpoint needs: refused"
    *_, text = text.split("WeightsUnpickler error:")
    first = re.split(r"\. |\n", text.strip())[0]
    return f"cannot be read ({first or type(error).__name__}): damaged or not a checkpoint"


def _difference(theirs: Tensor, ours: Tensor) -> str | None:
    """Describe why one tensor cannot be copied into another, ``None`` if it can."""
    if theirs.shape != ours.shape:
        return f"file {list(theirs.shape)}, model {list(ours.shape)}"
    if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
        return f"file {theirs.dtype}, model {ours.dtype}".replace("torch.", "")
    return None


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], f"... and {more} more"] if more > 0 else lines


def _hints(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Guess what a mismatch comes from: another architecture or another number of classes."""
    hints = []
    blocks, wanted = _blocks(theirs), _blocks(ours)
    if blocks != wanted:
        hints.append(
            f"The file's backbone has {blocks or 'no'} blocks, the model's {wanted}: "
            "the file is of another architecture."
        )
    classes, expected = (s.get("decode_head.conv_seg.weight") for s in (theirs, ours))
    if classes is not None and expected is not None and classes.shape[:1] != expected.shape[:1]:
        hints.append(
            f"The file is for {classes.shape[0] if classes.dim() else 'no'} classes, "
            f"the model for {expected.shape[0]}: num_classes must be the file's."
        )
    return hints


def _blocks(keys: Iterable[str]) -> str:
    """Count the blocks of each stage, as in ``"3-4-6-3"``."""
    matches = (re.match(r"backbone\.layer(\d+)\.(\d+)\.", key) for key in keys)
    blocks = Counter(stage for stage, _ in {match.groups() for match in matches if match})
    return "-".join(str(blocks[stage]) for stage in sorted(blocks))
