"""The folder for what this package can make again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``emanet_triton`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emanet_triton"
