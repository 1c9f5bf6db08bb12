"""Runs the blocks of Python in a page of the documentation."""

import re
from pathlib import Path
from typing import Any


def sections(page: Path) -> dict[str, list[str]]:
    """The blocks of Python below each heading that has any."""
    parts = re.split(r"^#+ (.+)\n", page.read_text(), flags=re.MULTILINE)
    found = {
        title: re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {title: blocks for title, blocks in found.items() if blocks}


def run_section(page: Path, title: str) -> dict[str, Any]:
    """Run the blocks of a section in turn.

    A shape in the comment of a line must be that of the line's variable.

    Returns:
        The variables that the blocks have made.
    """
    names: dict[str, Any] = {"__name__": "page"}
    for block in sections(page)[title]:
        exec(compile(block, f"{page.name}: {title}", "exec"), names)
        for name, shape in re.findall(r"^(\w+) = .*  # (\[[\d, ]+\])$", block, re.MULTILINE):
            assert str(list(names[name].shape)) == shape, name
    return names
