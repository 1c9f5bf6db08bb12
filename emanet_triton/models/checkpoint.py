"""Reading checkpoints that may be malicious or damaged."""

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from emanet_triton.errors import InputError
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.models.checkpoint_files.layouts import (
    LAYOUTS,
    MMSEGMENTATION,
    translated,
)
from emanet_triton.models.checkpoint_files.pdparams_file import read_pdparams_file
from emanet_triton.models.checkpoint_files.refusals import (
    DamagedError,
    DangerousError,
    UnsupportedError,
    shown,
)
from emanet_triton.models.checkpoint_files.safetensors_file import (
    header_end,
    is_safetensors,
    metadata_in,
    read_safetensors_file,
)
from emanet_triton.models.checkpoint_files.stored import Content, StoredTensor, make
from emanet_triton.models.checkpoint_files.torch_file import (
    is_legacy_file,
    metadata_in_zip,
    read_legacy_file,
    read_zip_file,
)
from emanet_triton.models.checkpoint_files.weights_in import find_weights

_PUBLISHED_NAME = re.compile(r".+-([0-9a-f]{8})\.pth")  # as mmcv's publish_model names files
_DATES = ("%Y%m%d", "%d%m%Y", "%m%d%Y")
_EXPECTED = "expected a PyTorch (.pth), PaddlePaddle (.pdparams) or safetensors checkpoint"
_LARGEST = 4 << 30  # bytes; a training's checkpoint of ResNet-101 takes 0.8 GB at most
_SHARED = 4  # times the file that tensors may claim together; those of most files share no memory
_POINTER = b"version https://git-lfs.github.com/"  # how Git LFS begins its stand-ins for files
_HEAD = 512  # bytes that tell the format
_ZIP = b"PK\x03\x04"  # how a zip begins
DESCRIPTION = "emanet_triton"  # metadata: the description of a file of this package
_LAYOUT = "layout"  # metadata: the layout of a converted file's source
_OF_MMSEG = ("mmseg_version", "mmengine_version", "config", "cfg")  # metadata of its trainings


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint file.

    Attributes:
        path: the file.
        sha256: of the whole file, 64 hex digits.
        state_dict: tensors on the CPU in the dtypes of the file, by the network's own names, also
            in a file of another project; empty after ``release``. The tensors share the memory that
            the file was read into, or are copies if they are less than half of the file.
        meta: texts and numbers that describe the file: ``mmseg_version``, ``config``, ``iter`` and
            others for mmseg files, ``source_sha256`` for converted files. It may be empty.
        layout: the project whose networks the weights belong to: ``"mmsegmentation"``,
            ``"sssegmentation"``, ``"official"`` or ``"paddleseg"``. The names in the file say it,
            or its metadata if ``convert`` wrote it. ``None`` if the file has a description of this
            package, which names the model.
    """

    path: Path
    sha256: str
    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    layout: str | None = None

    def release(self) -> None:
        """Free the weights. ``load_into`` reads the file again and checks that it is the same."""
        self.state_dict.clear()


def read_checkpoint(path: str | Path, sha256_prefix: str | None = None) -> Checkpoint:
    """Read a checkpoint of mmseg 0.x or 1.x, of another project or training, or of ``convert``.

    The file may be a PyTorch file (legacy or zip), a PaddlePaddle file (.pdparams) or a safetensors
    file; its content decides. The weights may be under ``state_dict``, under another name or at the
    top level, and their names may have the prefixes of wrappers; see ``find_weights``. Names of
    sssegmentation, of the authors' EMANet and of PaddleSeg are translated. No code in the file is
    executed. The file is read once, so the hash is the hash of these weights. Damage is always
    noticed in zip files, which have CRCs, and in files whose hash is known.

    Args:
        path: the file, at most 4 GiB.
        sha256_prefix: first hex digits of the expected SHA-256. If the name of the file ends in
            ``-<8 hex digits>.pth``, as mmcv names published files, the hash must begin with those
            digits as well, unless they are a date.

    Raises:
        InputError: the file cannot be read, is damaged or dangerous, has another hash, or its
            weights are not finite.
    """
    path = Path(path)
    try:
        data, read = _contents(path)
        sha256 = hashlib.sha256(data).hexdigest()
        _check_hash(path, sha256, sha256_prefix)
        content = read(data)
        stored, notes = find_weights(content.value)
        _check_sizes(stored, len(data))
        weights, layout = translated(make(data, content, stored))
        _check_values(weights)
        if 2 * sum(value.nbytes for value in weights.values()) < len(data):
            # Most of the file may be an optimizer's state: copies let its memory be freed.
            weights = {key: value.clone() for key, value in weights.items()}
    except DangerousError as error:
        reason = f"asks to run {shown(str(error))}, which no checkpoint needs: refused"
        raise InputError(f"{path}: {reason}; {_EXPECTED}") from error
    except DamagedError as error:
        reason = f"cannot be read ({error}): damaged or not a checkpoint"
        raise InputError(f"{path}: {reason}; {_EXPECTED}") from error
    except UnsupportedError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{path}: cannot be read: it does not fit into the memory") from error
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    noted = content.meta.get(_LAYOUT) if read is read_safetensors_file else None
    return Checkpoint(
        path, sha256, weights, content.meta, _known_layout(content.meta, layout, noted)
    )


def layout_metadata(layout: str | None) -> dict[str, str]:
    """Metadata of a safetensors file from which ``read_checkpoint`` knows the layout again."""
    return {} if layout is None else {_LAYOUT: layout}


def _known_layout(meta: dict[str, Any], found: str, noted: object) -> str | None:
    """The project whose networks the weights belong to, if the file says it.

    Args:
        meta: of the file.
        found: the layout of the names of the weights. Ours are mmsegmentation's.
        noted: the layout in the metadata of a safetensors file.
    """
    if DESCRIPTION in meta:
        return None
    if found != MMSEGMENTATION:
        return found
    if noted in LAYOUTS or noted == MMSEGMENTATION:
        return str(noted)
    return MMSEGMENTATION if any(key in meta for key in _OF_MMSEG) else None


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file or of PyTorch's zip file, whose weights are not read.

    Returns:
        The metadata, as ``Checkpoint.meta`` has them; nothing for any other file, also if it is
        damaged, dangerous or missing.
    """
    try:
        if not path.is_file():
            return {}
        with _open(path) as file:
            head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
            if head.startswith(_ZIP):
                return metadata_in_zip(file)
            if not is_safetensors(head, size):
                return {}
            end = header_end(head)
            file.seek(0)
            return metadata_in(file.read(end))
    except (OSError, ValueError):  # ValueError: DamagedError, or a null byte in the path
        return {}


def _contents(path: Path) -> tuple[memoryview, Callable[[memoryview], Content]]:
    """All bytes of a file, and the function that reads its format, chosen by the first bytes."""
    if not path.is_file():
        problem = "is not a file" if path.exists() else "no such file"
        raise UnsupportedError(f"{problem}; {_EXPECTED}")
    with _open(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnsupportedError(f"is not a file; {_EXPECTED}")
        read = _reader(file.read(_HEAD), status.st_size)
        if status.st_size > _LARGEST:
            raise UnsupportedError("is larger than 4 GiB; expected the weights of one network")
        file.seek(0)
        data = np.empty(status.st_size, np.uint8).data
        filled = 0
        while filled < len(data) and (count := file.readinto(data[filled:])):
            filled += count
    if filled < len(data):
        raise DamagedError("it became shorter while it was read")
    return data, read


def _open(path: Path) -> io.FileIO:
    """Open a file. If it was just replaced by a pipe, do not wait for the pipe's writer."""
    # Windows lacks O_NONBLOCK, and only Windows has O_BINARY.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    return io.FileIO(os.open(path, flags))


def _reader(head: bytes, size: int) -> Callable[[memoryview], Content]:
    """The function that reads a file, chosen by the file's first bytes."""
    if not head:
        raise UnsupportedError(f"is empty; {_EXPECTED}")
    if is_safetensors(head, size):  # before web pages: its length may begin with "<"
        return read_safetensors_file
    if head.startswith(_ZIP):
        return read_zip_file
    if head.startswith(b"\x80"):  # a pickle
        return read_legacy_file if is_legacy_file(head) else read_pdparams_file
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise UnsupportedError(f"is a web page; {_EXPECTED}: download the file again")
    if head.startswith(_POINTER):
        raise UnsupportedError(f"is a pointer of Git LFS; {_EXPECTED}: fetch it with git lfs pull")
    if head[257:262] == b"ustar":
        raise UnsupportedError(
            f"is a tar archive, as PyTorch before 0.1.10 wrote them, too; {_EXPECTED}: "
            "unpack it, or load it with such a PyTorch and save its state_dict with a newer one"
        )
    if head[8:9] == b"{":  # the JSON header of safetensors, after a wrong length
        raise DamagedError("its header ends beyond the file")
    raise UnsupportedError(f"is of no known format; {_EXPECTED}")


def _check_hash(path: Path, sha256: str, expected: str | None) -> None:
    if expected is not None and not sha256.startswith(expected):
        raise UnsupportedError(
            f"its SHA-256 begins with {sha256[: len(expected)]}, expected {expected}: "
            "the file is damaged or another one"
        )
    digits = named_digits(path.name)
    if digits and not sha256.startswith(digits):
        raise UnsupportedError(
            f"its SHA-256 begins with {sha256[:8]}, expected {digits} as in its name: "
            "the file is damaged, or the name must not end like a published one"
        )


def named_digits(name: str) -> str | None:
    """The digits with which the hash of a file of this name must begin, if it must at all."""
    named = _PUBLISHED_NAME.fullmatch(name)
    return named[1] if named and not _is_date(named[1]) else None


def _is_date(digits: str) -> bool:
    """Whether eight digits are a day of this century, in one of the usual orders."""
    for order in _DATES:
        try:
            if 2000 <= datetime.strptime(digits, order).year < 2100:
                return True
        except ValueError:
            continue
    return False


def _check_sizes(stored: dict[str, StoredTensor], size: int) -> None:
    """Refuse tensors that claim more memory than the file has, before any is made.

    Several tensors may share memory, as those of a module that has two names do. All are read and
    perhaps copied, so together they may claim a few times the file and no more.
    """
    for key, tensor in stored.items():
        if tensor.nbytes > size:
            raise UnsupportedError(f"{shown(key)} claims to be larger than the whole file")
    if sum(tensor.nbytes for tensor in stored.values()) > _SHARED * size:
        raise UnsupportedError(
            f"its {len(stored)} tensors together claim to be larger than {_SHARED} times the file"
        )


def _check_values(weights: dict[str, Tensor]) -> None:
    """Refuse weights that are complex or are not finite in float32, and negative variances."""
    infinite = []
    for key, value in weights.items():
        if value.is_complex():
            raise UnsupportedError(f"expected real weights, but {shown(key)} is complex")
        if not value.is_floating_point() or not value.numel():
            continue
        lowest, highest = value.float().aminmax()
        if not (lowest.isfinite() and highest.isfinite()):  # NaN is the lowest and the highest
            infinite.append(key)
        elif key.endswith("running_var") and lowest < 0:
            raise UnsupportedError(f"{shown(key)} is negative; expected variances")
    if infinite:
        raise UnsupportedError(
            f"expected finite weights, but {len(infinite)} of {len(weights)} tensors "
            f"hold NaN or infinity in float32, first {shown(infinite[0])}"
        )
