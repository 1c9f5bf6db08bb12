"""A busy process beside the measurements, as on a shared machine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Each ends with the process that started it, also where that process is killed.
PROGRAMS = {
    "spin": "while os.getppid() == parent: pass",
    "memory": "a, b = bytearray(2**28), bytearray(2**28)\nwhile os.getppid() == parent: b[:] = a",
}


def label(kind: str) -> str:
    """Words added to the device's name in each row.

    So ``compare`` never pairs it with a row of a quiet machine.
    """
    return f"one busy neighbour ({kind})"


@contextlib.contextmanager
def beside(kind: str | None) -> Iterator[None]:
    """Have one busy process within; without a kind none."""
    if kind is None:
        yield
        return
    code = f"import os\nparent = {os.getpid()}\n{PROGRAMS[kind]}"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()
