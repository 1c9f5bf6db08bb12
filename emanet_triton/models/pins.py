"""The hash of a file for which nobody has published one: noted when it is first opened.

The note lies beside the file, in the form that ``sha256sum --check`` reads. A note that holds the
hash alone, as some projects publish it, is read too.
"""

import re
import warnings
from pathlib import Path

from emanet_triton.errors import InputError, one_line
from emanet_triton.files import read_plain, write_whole
from emanet_triton.models.checkpoint import Checkpoint

_NOTE = re.compile(r"([0-9a-fA-F]{64})(?: [ *]([^\n]+))?\n?")
_MOST_BYTES = 4096


def pin_path(path: Path) -> Path:
    """Where the hash of a file is noted."""
    return path.with_name(f"{path.name}.sha256")


def pinned(path: Path) -> str | None:
    """The SHA-256 that was noted for a file, 64 hex digits; ``None`` if there is no note.

    Raises:
        InputError: the note cannot be read, or names another file.
    """
    note = pin_path(path)
    try:
        text = read_plain(note, _MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{note}: cannot be read ({error.strerror or error})") from error
    found = _NOTE.fullmatch(text)
    # sha256sum writes the path as it was given.
    if found is None or (found[2] and Path(found[2]).name != path.name):
        problem = "is damaged" if found is None else f"is the note of {one_line(found[2])}"
        raise InputError(
            f"{note}: {problem}; expected the SHA-256 of {path.name}, as sha256sum writes it. "
            "Delete the note if the file is the right one"
        )
    return found[1].lower()


def check_pin(checkpoint: Checkpoint, note: bool = True) -> None:
    """Compare a file with the hash that was noted for it, or note its hash now.

    If the note cannot be written, a warning says so.

    Args:
        checkpoint: the file.
        note: whether to note the hash if there is no note.

    Raises:
        InputError: the file is another one than before, or the note cannot be read or names
            another file.
    """
    path, place = checkpoint.path, pin_path(checkpoint.path)
    expected = pinned(path)
    if expected is None:
        if not note:
            return
        try:
            write_whole(place, f"{checkpoint.sha256}  {path.name}\n".encode())
        except OSError as error:
            reason = error.strerror or error
            warnings.warn(f"{place}: cannot be written ({reason}); no hash is noted", stacklevel=2)
    elif checkpoint.sha256 != expected:
        raise InputError(
            f"{path}: its SHA-256 begins with {checkpoint.sha256[:8]}, expected {expected[:8]} as "
            f"noted in {place.name} when it was first opened: the file is damaged or another one. "
            "Delete the note if you replaced the file on purpose"
        )
