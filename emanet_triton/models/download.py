"""Downloading a published file: once, whole and verified, over connections that break."""

import contextlib
import errno
import hashlib
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from io import BufferedRandom
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch
from tqdm import tqdm

from emanet_triton.cache_folder import writable_or_private
from emanet_triton.command import complain
from emanet_triton.errors import InputError, first_line, one_line
from emanet_triton.files import exists, open_plain, temporary_beside
from emanet_triton.models.connection import open_url, through_proxy, without_secrets

_CHUNK = 1 << 20  # bytes
_MOST_BYTES = 1 << 30  # largest download; the largest published file has a quarter of this size
_STUCK = 180.0  # seconds without growth after which another process's download counts as stuck
_LOOK = 0.1  # seconds between two looks at another process's download
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_MOST_TEXT = 4096  # bytes of a text with a hash
_MD5 = re.compile(r"\s*[0-9a-f]{32}\b")
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


def hub_file(name: str) -> Path:
    """Where a published checkpoint lies, or where it is to be saved.

    It is in torch's hub cache. If the hub cache lacks the file and cannot be written, it is in a
    private temporary folder (see ``writable_or_private``).
    """
    given = torch.hub.get_dir()
    folder = Path(given) if given.startswith("~") else Path(given).absolute()  # no home: ~ stays
    found = folder / "checkpoints" / name
    return found if exists(found) else writable_or_private(folder) / "checkpoints" / name


def download(
    url: str,
    destination: Path,
    sha256_prefix: str | None = None,
    progress: bool = True,
    *,
    md5_url: str | None = None,
) -> Path:
    """Download a file unless it exists already.

    The data are written to ``<destination>.part``. The part is renamed when its length and hash
    are right. If the download is interrupted, the part stays, and the next call continues it; if no
    hash is known, it begins again. A second process waits for the first one while the part grows.
    On a file system without locks each process has a part of its own, which is removed in the end.

    Proxies are taken from the environment (``https_proxy`` and others, as in ``urllib``).

    Args:
        url: of the file.
        destination: where to save the file; the folder is made. An existing file that is not
            empty is neither downloaded nor checked: ``read_checkpoint`` checks it whenever it
            opens it.
        sha256_prefix: first hex digits, in lower case, of the file's SHA-256; ``None`` if nobody
            has published it.
        progress: show a progress bar on stderr.
        md5_url: of a text that begins with the file's MD5, for a file without a published SHA-256.
            If the text cannot be fetched, a warning says that the file is unchecked.

    Returns:
        ``destination``.

    Raises:
        InputError: the network or the disk failed, less than 64 KiB came in a minute, another
            process's download did not grow for three minutes, the file is larger than a gigabyte,
            or a hash is wrong (the part is removed).
    """
    if _is_there(destination):
        return destination
    part = destination.with_name(destination.name + ".part")
    lock = destination.with_name(destination.name + ".lock")
    has_locks = True
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock, part, progress) as has_locks:
            if not _is_there(destination):  # or another process has fetched it meanwhile
                own = part if has_locks else temporary_beside(destination)
                try:
                    _complete(url, own, destination, sha256_prefix, progress, md5_url)
                finally:
                    if not has_locks:
                        own.unlink(missing_ok=True)
    except InputError:
        raise
    except (OSError, HTTPException, ValueError) as error:  # ValueError: a malformed address
        goes_on = has_locks and (sha256_prefix or md5_url)
        again = "The next try goes on from what has arrived; the" if goes_on else "The"
        raise InputError(
            f"{without_secrets(url)}: cannot be downloaded{through_proxy(url)}: "
            f"{_reason(url, error)}. {again} file can also be fetched by hand and saved as "
            f"{destination}"
        ) from error
    return destination


def _is_there(destination: Path) -> bool:
    """Whether the file exists. An empty file is left from a failed attempt and does not count."""
    return exists(destination) and not (destination.is_file() and destination.stat().st_size == 0)


def _reason(url: str, error: Exception) -> str:
    if isinstance(error, HTTPError):
        error.close()
    reason = error.reason if type(error) is URLError else error
    text = first_line(reason) if isinstance(reason, BaseException) else str(reason)
    return one_line(without_secrets(text, url))[:300]


class _NoLocksError(Exception):
    """The file system has no locks, or another user's lock cannot be opened."""


@contextlib.contextmanager
def _locked(lock: Path, part: Path, progress: bool) -> Iterator[bool]:
    """Hold the lock of a part. Yields whether the file system has locks.

    Raises:
        TimeoutError: another process holds the lock, and its part does not grow.
    """
    try:
        descriptor = _wait_for(lock, part, progress)
    except _NoLocksError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(PermissionError):  # Windows removes no open file
            lock.unlink(missing_ok=True)  # a process that waits for the lock notices this
        os.close(descriptor)


def _wait_for(lock: Path, part: Path, progress: bool) -> int:
    """Wait for the lock; returns its open, locked file."""
    size, grown, told = -1, time.monotonic(), not progress
    while (descriptor := _try_lock(lock)) is None:
        if (now := _size(part)) != size:
            size, grown = now, time.monotonic()
        if time.monotonic() - grown > _STUCK:
            raise TimeoutError(
                f"another process holds {lock}, and its download has not grown for {_STUCK:g} s; "
                "end that process"
            )
        if not told:
            complain(f"waiting for another process that downloads {part.stem}")
            told = True
        time.sleep(_LOOK)
    return descriptor


def _try_lock(lock: Path) -> int | None:
    """The open, locked file of the lock; ``None`` if another process holds the lock."""
    from filelock import lock_descriptor  # not above: gpu-check downloads nothing and needs none

    try:
        descriptor = open_plain(lock, os.O_RDWR | os.O_CREAT)
    except PermissionError as error:
        raise _NoLocksError from error
    try:
        locked = lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        os.close(descriptor)
        lock.unlink(missing_ok=True)
        if error.errno in _NO_LOCKS:
            raise _NoLocksError from error
        raise
    if locked and _is_same(descriptor, lock):
        return descriptor
    os.close(descriptor)
    return None


def _is_same(descriptor: int, lock: Path) -> bool:
    """Whether the open file still has its name. The last holder of the lock removes the name."""
    try:
        return os.path.samestat(os.fstat(descriptor), lock.lstat())
    except FileNotFoundError:
        return False


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return -1


def _complete(
    url: str,
    part: Path,
    destination: Path,
    sha256_prefix: str | None,
    progress: bool,
    md5_url: str | None,
) -> None:
    """Complete ``part``, check its hash and give it its final name."""
    with os.fdopen(open_plain(part, os.O_RDWR | os.O_CREAT), "r+b") as file:
        if sha256_prefix is None and md5_url is None:
            file.truncate(0)  # nothing would show that an older part is of another file
        if sha256_prefix is None or not _digest(file, "sha256").startswith(sha256_prefix):
            _fetch(url, file, destination.name, progress)
        kind, expected = "sha256", sha256_prefix
        if expected is None and md5_url is not None:
            kind, expected = "md5", _published_md5(md5_url)
        found = _digest(file, kind)
    if expected is not None and not found.startswith(expected):
        part.unlink(missing_ok=True)
        name = {"sha256": "SHA-256", "md5": "MD5"}[kind]
        raise InputError(
            f"{without_secrets(url)}: the {name} of the received data begins with "
            f"{found[: len(expected)]}, expected {expected}: the data were thrown away"
        )
    part.replace(destination)


def _published_md5(url: str) -> str | None:
    """The MD5 at the beginning of a published text; ``None``, with a warning, without one."""
    try:
        with open_url(url) as response:
            text = response.read(_MOST_TEXT).decode("ascii", errors="replace").lower()
        if found := _MD5.match(text):
            return found[0].strip()
        reason = "it holds no MD5"
    except (OSError, HTTPException) as error:
        reason = _reason(url, error)
    warnings.warn(
        f"{without_secrets(url)}: cannot be used ({reason}); the downloaded file is not checked",
        stacklevel=2,
    )
    return None


def _fetch(url: str, file: BufferedRandom, name: str, progress: bool) -> None:
    """Append what is missing, or start again if the server cannot resume."""
    start = file.seek(0, os.SEEK_END)
    response = _resume(url, start) if start else None
    if response is None or response.status != HTTPStatus.PARTIAL_CONTENT:
        start = 0
    with response or open_url(url) as response:
        total = None if response.length is None else start + response.length
        file.seek(start)
        file.truncate()
        _check(response, start)
        _check_size(file, total or 0)
        with tqdm(
            desc=name,
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            disable=not progress or sys.stderr is None,
        ) as bar:
            while chunk := response.read1(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                _check_size(file, file.tell())
        file.flush()
    if total is not None and file.tell() != total:
        raise ConnectionError(f"the connection closed after {file.tell()} of {total} bytes")


def _resume(url: str, start: int) -> HTTPResponse | None:
    """The answer, if it begins at ``start`` or is the whole file; otherwise ``None``."""
    try:
        response = open_url(url, {"Range": f"bytes={start}-"})
    except HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()  # the part is at least as long as the file, but is not the file
        return None
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status == HTTPStatus.PARTIAL_CONTENT and not (found and int(found[1]) == start):
        response.close()
        return None
    return response


def _check(response: HTTPResponse, start: int) -> None:
    """Raise OSError for an answer that is not the bytes of the file."""
    expected = HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK
    if response.status != expected:
        raise ConnectionError(f"the server answered {response.status}, expected {expected.value}")
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ConnectionError(f"the answer is compressed ({encoding}), which was not asked for")


def _check_size(file: BufferedRandom, size: int) -> None:
    if size > _MOST_BYTES:
        file.truncate(0)
        raise OSError(errno.EFBIG, f"it is larger than {_MOST_BYTES} bytes")


def _digest(file: BufferedRandom, kind: str) -> str:
    file.seek(0)
    return hashlib.file_digest(file, kind).hexdigest()
