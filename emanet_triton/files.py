"""Writing a file so that nobody ever reads half of it."""

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then put it in its place.

    Raises:
        OSError: the file cannot be written; what stood at ``path`` still does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone after the replacement, left by a failure
            temporary.unlink()
