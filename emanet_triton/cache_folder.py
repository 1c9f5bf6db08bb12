"""The folder for what this package can make again."""

import contextlib
import functools
import os
import stat
import tempfile
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """``emanet_triton`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet.

    A relative ``$XDG_CACHE_HOME`` is ignored, as its specification asks. Where the folder cannot
    be written, ``writable_or_private`` names another one.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return writable_or_private(
        (given if given.is_absolute() else _home() / ".cache") / "emanet_triton"
    )


def writable_or_private(folder: Path) -> Path:
    """The folder if this process can make it and write there, else a private temporary one.

    The first time that the other one is taken, a warning says so.
    """
    nearest = next((f for f in (folder, *folder.parents) if os.access(f, os.F_OK)), None)
    if folder.is_absolute() and nearest and _is_writable(nearest):
        return folder
    return _instead_of(folder)


def _home() -> Path:
    """The home folder, or a relative path where there is none."""
    given = Path(os.environ.get("HOME", ""))
    if given.is_absolute():
        return given
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):  # a container's user without an entry
        return Path("~")


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@functools.cache  # one warning for a folder
def _instead_of(folder: Path) -> Path:
    """A folder of this user alone, in the folder of temporary files."""
    private = Path(tempfile.gettempdir(), f"emanet_triton-{os.getuid()}")
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700)
    found = private.lstat() if os.path.lexists(private) else None
    ours = found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if not ours or found.st_mode & 0o077:
        private = Path(os.devnull)  # where nothing can be written: the other is somebody else's
    warnings.warn(
        f"{folder}: cannot be written; {private} is used instead. XDG_CACHE_HOME names another",
        stacklevel=1,
    )
    return private / folder.name
