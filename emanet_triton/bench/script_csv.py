"""The CSV files of the scripts that measure something outside the suites."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emanet_triton.files import require_own, require_writable, write_output
from emanet_triton.versions import commit, versions

# Every such table has these columns, and others before and between them.
_BEGINNING = re.compile(rb"[^\n]*,emanet_triton,[^\n]*,commit\n")


def require_table(path: Path) -> None:
    """Check that ``write_table`` can write the file. Call it before a long measurement.

    Raises:
        InputError: it cannot, or a file of another kind is there.
    """
    require_writable(path)
    require_own(path, _BEGINNING, "table that a script of emanet-triton wrote")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], **where: Any) -> None:
    """Write measured rows, each with ``where``, the versions and the commit.

    Raises:
        InputError: the file cannot be written.
    """
    where |= versions() | {"commit": commit()}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], *where], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **where} for row in rows)
    write_output(path, text.getvalue().encode(), make_folder=True)
