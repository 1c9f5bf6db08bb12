"""Errors as texts of one line."""

import pytest

from emanet_triton.errors import describe


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such thing\nand more"), "ValueError: no such thing"),
        (RuntimeError("\n  the second line"), "RuntimeError: the second line"),
        (KeyError("C"), "KeyError: 'C'"),
        (MemoryError(), "MemoryError"),
        (AssertionError(" \n"), "AssertionError"),
    ],
    ids=["lines", "empty-first-line", "key", "no-message", "blank"],
)
def test_type_and_first_line(error, text):
    assert describe(error) == text
