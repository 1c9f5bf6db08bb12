"""PNG files of all forms, whole and damaged.

An independent decoder, ``png_reference``, says what each file holds, or that it is not valid.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from emanet_triton.data.png import png_size, read_image, read_label_png
from emanet_triton.errors import InputError
from tests.fuzz.png_reference import BrokenRuleError, Png, image, label, parse, samples, size
from tests.fuzz.png_writer import make


def attempt(seed: int, folder: Path) -> str:
    """Make a file, read it in every way, and compare with the reference."""
    rng = Random(seed)
    data, intact = make(rng)
    path = folder / "file.png"
    path.write_bytes(data)
    png = _or_broken(parse, data)
    if intact is not None:
        np.testing.assert_array_equal(samples(png), intact, "the reference is wrong")
    read = [
        _agree(path, png_size, png, size),
        _agree(path, read_image, png, image),
        _agree(path, read_label_png, png, label),
    ]
    return "right" if any(read[1:]) else "refused"


def _or_broken(function: Callable, argument: object) -> object:
    try:
        return function(argument)
    except BrokenRuleError as error:
        return error


def _agree(path: Path, reader: Callable, png: Png | BrokenRuleError, expect: Callable) -> bool:
    """Whether the reader reads the file; AssertionError if the reference disagrees."""
    expected = png if isinstance(png, BrokenRuleError) else _or_broken(expect, png)
    try:
        found = reader(path)
    except InputError as error:
        assert isinstance(expected, BrokenRuleError), f"valid, but refused: {error}"
        return False
    assert not isinstance(expected, BrokenRuleError), f"read, but not valid: {expected}"
    assert np.shape(found) == np.shape(expected)
    if isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    return True
