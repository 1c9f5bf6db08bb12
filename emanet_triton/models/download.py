"""Fetching a published file once, whole and verified, over connections that break."""

import fcntl
import hashlib
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from emanet_triton.errors import InputError

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without a byte


def download(url: str, destination: Path, sha256_prefix: str, progress: bool = True) -> Path:
    """Fetch a file unless it is there already.

    The body is collected in ``<destination>.part``, which takes its final name only when its
    length and hash are right. Whatever stops a download, the part stays and the next call goes
    on from there. A second process waits for the first.

    Args:
        url: of the file.
        destination: where it shall lie; the folder is made. A file that lies there is returned
            as it is, without the network: ``read_checkpoint`` verifies it whenever it opens it.
        sha256_prefix: first hex digits, in lower case, of the file's SHA-256.
        progress: show a progress bar on stderr.

    Returns:
        ``destination``.

    Raises:
        InputError: the network or the disk failed, or the hash is wrong (the part is removed).
    """
    part = destination.with_name(destination.name + ".part")
    lock = destination.with_name(destination.name + ".lock")
    try:
        if destination.exists():
            return destination
        destination.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not destination.exists():  # or another process has fetched it meanwhile
                _complete(url, part, sha256_prefix, progress)
                part.replace(destination)
            lock.unlink(missing_ok=True)  # those who still wait on it will find the destination
    except (OSError, HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise InputError(
            f"{url}: cannot be downloaded: {reason}. The next try goes on from what has arrived; "
            f"the file can also be fetched by hand and saved as {destination}"
        ) from error
    return destination


def _complete(url: str, part: Path, sha256_prefix: str, progress: bool) -> None:
    """Bring ``part`` to the whole file."""
    if part.exists() and _sha256(part).startswith(sha256_prefix):
        return
    _fetch(url, part, progress)
    found = _sha256(part)
    if not found.startswith(sha256_prefix):
        part.unlink()
        raise InputError(
            f"{url}: the SHA-256 of what arrived begins with {found[: len(sha256_prefix)]}, "
            f"expected {sha256_prefix}: it was thrown away"
        )


def _fetch(url: str, part: Path, progress: bool) -> None:
    """Append to ``part`` what it lacks, or write it anew if the server cannot resume."""
    start = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, start)
    except HTTPError as error:
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
            raise
        part.unlink()  # as long as the file or longer, and not the file
        start, response = 0, _open(url, 0)
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0
        total = None if response.length is None else start + response.length
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                desc=part.stem,
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=not progress,
            ) as bar,
        ):
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"the connection closed after {size} of {total} bytes")


def _open(url: str, start: int) -> HTTPResponse:
    headers = {"User-Agent": "emanet-triton"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return urlopen(Request(url, headers=headers), timeout=_TIMEOUT)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
