"""The folder for files that this package can make again."""

import contextlib
import functools
import os
import stat
import tempfile
import warnings
from pathlib import Path


def cache_folder() -> Path:
    """``emanet_triton`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet.

    A relative ``$XDG_CACHE_HOME`` is ignored, as the XDG specification asks. If the folder cannot
    be written, ``writable_or_private`` names another one.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return writable_or_private(
        (given if given.is_absolute() else _home() / ".cache") / "emanet_triton"
    )


def writable_or_private(folder: Path) -> Path:
    """The folder, if this process can make and write it, else a private temporary folder.

    The first use of the temporary folder gives a warning.
    """
    nearest = next((f for f in (folder, *folder.parents) if os.access(f, os.F_OK)), None)
    if folder.is_absolute() and nearest and _is_writable(nearest):
        return folder
    return _instead_of(folder)


def _home() -> Path:
    """The home folder, or a relative path if there is none."""
    given = Path(os.environ.get("HOME", ""))
    if given.is_absolute():
        return given
    try:
        import pwd

        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except ImportError:  # Windows
        return Path(os.environ.get("USERPROFILE", "~"))
    except KeyError:  # the user of a container may have no entry
        return Path("~")


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _is_of_user_alone(folder: Path, user: int) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o077


@functools.cache  # one warning for a folder
def _instead_of(folder: Path) -> Path:
    """A folder of this user alone, in the folder of temporary files."""
    getuid = getattr(os, "getuid", None)
    if getuid is None:  # Windows, where each user has a folder of temporary files
        private = Path(tempfile.gettempdir(), "emanet_triton")
    else:
        private = Path(tempfile.gettempdir(), f"emanet_triton-{getuid()}")
        with contextlib.suppress(OSError):
            private.mkdir(mode=0o700)
        if not _is_of_user_alone(private, getuid()):
            private = Path(os.devnull)  # nothing can be written there
    warnings.warn(
        f"{folder}: cannot be written; {private} is used instead; set XDG_CACHE_HOME to choose "
        "another folder",
        stacklevel=1,
    )
    return private / folder.name
