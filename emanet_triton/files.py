"""Writing files so that no reader ever sees a part of one, and reading files of other users."""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from emanet_triton.errors import InputError

# Windows lacks most of these flags, and needs O_BINARY to leave bytes as they are.
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a FIFO without a reader blocks nobody
_NO_TERMINAL = getattr(os, "O_NOCTTY", 0)
_LEFTOVER = re.compile(r"\..+\.emanet-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
_OLD = 3600  # seconds after which no process still writes a temporary file
_NAME_BYTES = 180  # bytes of a file's name in its temporary file's name, which has at most 255
_LINKS = 40  # symbolic links that lead to each other; Linux follows as many


def open_plain(path: Path, flags: int) -> int:
    """Open a regular file with ``os.open``. Refuse a link that somebody planted at ``path``.

    Raises:
        OSError: also if ``path`` is a symbolic link, a FIFO or a device, or if a file that is to
            be written has a second name.
    """
    try:
        descriptor = os.open(path, flags | _BINARY | _NO_LINK | _NO_WAIT, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "Is a symbolic link", str(path)) from None
        raise
    found = os.fstat(descriptor)
    written = flags & (os.O_WRONLY | os.O_RDWR)
    if not stat.S_ISREG(found.st_mode) or (written and found.st_nlink > 1):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Is not a regular file with one name", str(path))
    return descriptor


def read_plain(path: Path, most: int) -> bytes:
    """The first bytes of a regular file, at most ``most``.

    Raises:
        OSError: the file cannot be read, or ``open_plain`` refuses it.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        return file.read(most)


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder.

    Unlike ``Path.exists`` it never raises, for example where a name is too long.
    """
    return os.path.exists(path)  # noqa: PTH110


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder. Unlike ``Path.is_dir`` it never raises."""
    return os.path.isdir(path)  # noqa: PTH112


def is_stream(path: Path) -> bool:
    """Whether ``path`` is a pipe, a terminal or another device, which keeps nothing."""
    target, descriptor = _resolve(path)
    return descriptor is not None or _is_device(target)


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then give it the name ``path``.

    No reader ever sees a part of it, even if several threads or processes write it at once. If
    ``path`` is a symbolic link, its target is written. An earlier file's permissions are kept. A
    stream (see ``is_stream``) is written directly.

    Raises:
        OSError: the file cannot be written. An earlier file stays as it was.
    """
    try:
        target, descriptor = _resolve(path)
        if descriptor is not None:
            _write(os.dup(descriptor), data)
        elif _is_device(target):
            _write_stream(target, data)
        else:
            _replace(target, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_output(path: Path, data: bytes, make_folder: bool = False) -> None:
    """Write a file that the user asked for, with ``write_whole``.

    Args:
        path: of the file.
        data: its content.
        make_folder: make the folder of the file.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


def require_writable(path: Path) -> None:
    """Make the folder of ``path``, and check that ``write_whole`` can write the file.

    Raises:
        InputError: ``write_whole`` cannot.
    """
    try:
        target, descriptor = _resolve(path)
        if descriptor is not None:
            os.fstat(descriptor)
        elif _is_device(target):
            _check_stream(target)
        else:
            _check_file(path, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def require_own(path: Path, beginning: re.Pattern[bytes], kind: str) -> None:
    """Refuse to replace a file of another kind. An empty file and a stream are not refused.

    Args:
        path: of the file that is to be written; nothing may be there yet.
        beginning: matches the first bytes of every file of the kind, at most 4,096.
        kind: what the message calls such a file.

    Raises:
        InputError: the file is of another kind or cannot be read.
    """
    if not exists(path) or is_stream(path):
        return
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise InputError(f"{path}: exists and cannot be read ({error.strerror})") from None
    if start and not beginning.match(start):
        raise InputError(
            f"{path}: exists and is no {kind}; expected a new name, or such a file, which is "
            "replaced"
        )


def require_folder(folder: Path) -> None:
    """Make a folder, check that it can be written, and remove temporary files of killed runs.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own for every process
            pass
    except OSError as error:
        raise InputError(
            f"{folder}: expected a folder that can be written ({error.strerror})"
        ) from None
    _clean_once(folder)


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no other process uses, for ``remove_leftovers`` to find."""
    short = os.fsencode(path.name)[:_NAME_BYTES].decode(errors="ignore")  # whole characters
    token = f"emanet-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{short}.{token}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the files that killed processes left under names of ``temporary_beside``."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _LEFTOVER.fullmatch(entry.name)
            if found and _is_abandoned(entry, found):
                _remove(Path(entry))


def _mode(path: Path) -> int:
    """Type and permissions of a file; 0 if there is none or it cannot be seen."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _is_device(path: Path) -> bool:
    mode = _mode(path)
    return bool(mode) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _resolve(path: Path) -> tuple[Path, int | None]:
    """The file behind symbolic links, or the descriptor of this process that a link names."""
    own = re.compile(rf"/proc/{os.getpid()}(?:/task/\d+)?/fd/(\d+)")
    current = path.absolute()
    for _ in range(_LINKS):
        current = Path(os.path.realpath(current.parent), current.name)
        if found := own.fullmatch(str(current)):
            return path, int(found[1])
        if not current.is_symlink():
            return current, None
        current = current.parent / current.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _check_stream(path: Path) -> None:
    if stat.S_ISBLK(_mode(path)):
        raise OSError(errno.EINVAL, "it is a disk")
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _check_file(path: Path, target: Path) -> None:
    if target.is_dir():
        raise InputError(f"{path}: expected a file to write, this is a folder")
    if _mode(target) and not os.access(target, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    require_folder(target.parent)


def _write(descriptor: int, data: bytes, mode: int = 0) -> None:
    with os.fdopen(descriptor, "wb") as file:
        if mode and hasattr(os, "fchmod"):  # not on Windows
            os.fchmod(descriptor, stat.S_IMODE(mode))
        file.write(data)


def _write_stream(path: Path, data: bytes) -> None:
    _check_stream(path)
    _write(os.open(path, os.O_WRONLY | _BINARY | _NO_TERMINAL), data)


def _replace(path: Path, data: bytes) -> None:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if mode and not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    _clean_once(path.parent)
    temporary = temporary_beside(path)
    try:
        _write(open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), data, mode)
        temporary.replace(path)
    except OSError as error:
        if error.errno != errno.EBUSY:  # a file that a container mounts cannot be replaced
            raise
        _write(os.open(path, os.O_WRONLY | os.O_TRUNC | _BINARY | _NO_LINK), data)
    finally:
        with contextlib.suppress(OSError):  # it is there only after a failure
            temporary.unlink()


@functools.cache
def _machine() -> str:
    """Eight hex digits that name this boot of this machine or container.

    A process id means the same process only there.
    """
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:8]


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another process may have removed it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@functools.lru_cache(maxsize=64)
def _clean_once(folder: Path) -> None:
    remove_leftovers(folder)  # not at each write, since a folder may hold thousands of pictures


def _is_abandoned(entry: os.DirEntry[str], found: re.Match[str]) -> bool:
    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD:
        return True
    return found["machine"] == _machine() and not _is_alive(int(found["process"]))


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where ``os.kill`` would interrupt the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
