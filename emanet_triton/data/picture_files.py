"""The files that a folder or a pattern names."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from emanet_triton.data.picture import SUFFIXES
from emanet_triton.errors import InputError

_MAGIC = set("*?[")


def is_picture(path: Path) -> bool:
    """Whether a file has the name of a picture."""
    return path.suffix.lower() in SUFFIXES


def is_pattern(text: str) -> bool:
    """Whether a text has a wildcard."""
    return not _MAGIC.isdisjoint(text)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in its folders that are not hidden, sorted by path.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for place, inner, names in os.walk(folder, onerror=refuse):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def pictures_among(files: list[Path], folder: Path) -> list[Path]:
    """The pictures among the files of a folder.

    Raises:
        InputError: there is none.
    """
    pictures = [path for path in files if is_picture(path)]
    if not pictures:
        raise InputError(
            f"{folder}: the folder has no picture; expected files that end with "
            + " ".join(sorted(SUFFIXES))
        )
    return pictures


def files_like(pattern: str) -> list[Path]:
    """The files that match a pattern such as ``"photos/**/*.jpg"``, sorted by path."""
    matches = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (may be absolute)
    return sorted(path for path in matches if path.is_file())
