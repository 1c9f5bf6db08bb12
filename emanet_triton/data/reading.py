"""What all readers of pictures share: which files are opened, and how a bad file is refused."""

import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2

from emanet_triton.errors import InputError, first_line

MAX_FILE_BYTES = 2**30  # more than the pixels of the largest image take without compression


@contextmanager
def refusing(path: Path | str, kind: str, expected: str | None = None) -> Iterator[None]:
    """Turn every error that a bad file causes into an InputError that names the file.

    Args:
        path: the file, or what the message calls it.
        kind: what was read, such as ``"PNG"``.
        expected: the kinds that were expected; by default ``kind``.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: there is no such file; expected a {expected or kind} file"
        ) from error
    except (OSError, ValueError, zlib.error, cv2.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{path}: not a readable {kind} ({reason}); expected an intact {expected or kind} file"
        ) from error


def read_regular(path: Path) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or absurdly large.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("it is a pipe, a socket or a device")  # reading might never end
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"it has {status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
    return path.read_bytes()
