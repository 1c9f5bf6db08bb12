"""How files are written whole, and the folder for what this package can make again."""

import contextlib
import os
import threading
from pathlib import Path


def cache_folder() -> Path:
    """``emanet_triton`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emanet_triton"


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, then put it in its place.

    Nobody ever reads half of it, also where several threads or processes write it at once.

    Raises:
        OSError: the file cannot be written; what stood at ``path`` still does.
    """
    writer = f"{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # gone after the replacement, left by a failure
            temporary.unlink()
