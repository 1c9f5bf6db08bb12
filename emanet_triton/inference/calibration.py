"""The pictures from which int8 takes the ranges of its activations."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from emanet_triton.data.picture import read_picture
from emanet_triton.data.picture_files import (
    files_below,
    files_like,
    is_pattern,
    is_picture,
    pictures_among,
)
from emanet_triton.errors import InputError

CALIBRATION_IMAGES = 8  # as many as ``quantize`` advises

T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """Pictures for ``quantize``.

    Attributes:
        paths: of the pictures.
        source: where they come from, for messages.
        read: reads a picture as uint8 RGB [H, W, 3].
    """

    paths: tuple[Path, ...]
    source: str
    read: Callable[[Path], np.ndarray] = read_picture

    def __str__(self) -> str:
        number = len(self.paths)
        return f"ranges from {number} image{'s' * (number > 1)} ({self.source})"

    def images(self) -> list[np.ndarray]:
        """Read the pictures.

        Raises:
            InputError: one of them cannot be read.
        """
        return [self.read(path) for path in self.paths]


def evenly_spread(items: Sequence[T]) -> list[T]:
    """``CALIBRATION_IMAGES`` of the items, from the first to the last, or all if they are fewer."""
    most = min(CALIBRATION_IMAGES, len(items))
    return [items[i * (len(items) - 1) // max(most - 1, 1)] for i in range(most)]


def named_calibration(named: str) -> Calibration:
    """The pictures of ``--calibration``: of many, ``CALIBRATION_IMAGES`` evenly spread ones.

    Args:
        named: a picture, a folder of pictures, or a pattern.

    Raises:
        InputError: there is no picture, or one that is taken cannot be read.
    """
    try:
        paths = evenly_spread(_pictures(named))
        for path in paths:
            read_picture(path)
    except InputError as error:
        raise InputError(f"--calibration {error}") from None
    return Calibration(tuple(paths), named)


def readable_calibration(paths: Sequence[Path], source: str) -> Calibration:
    """Evenly spread pictures without those that cannot be read.

    Args:
        paths: of all pictures, at least one.
        source: where they come from, for messages.

    Raises:
        InputError: none of the pictures that were tried can be read.
    """
    good: list[Path] = []
    problems: list[InputError] = []
    for path in evenly_spread(paths):
        try:
            read_picture(path)
            good.append(path)
        except InputError as error:
            problems.append(error)
    if not good:
        raise InputError(f"int8 finds no picture for its ranges: {problems[0]}")
    return Calibration(tuple(good), source)


def _pictures(named: str) -> list[Path]:
    path = Path(named)
    try:
        if named and path.is_dir():
            return pictures_among(list(files_below(path)), path)
        if named and os.path.lexists(path):
            return [path]
        if is_pattern(named):
            if found := [path for path in files_like(named) if is_picture(path)]:
                return found
            raise InputError(f"{named}: the pattern matches no picture")
    except OSError as error:
        raise InputError(f"{named}: cannot be read ({error})") from None
    raise InputError(
        f"{named or repr(named)}: there is no such file or folder; expected a picture, a folder of "
        "pictures or a pattern such as 'photos/*.jpg'"
    )
