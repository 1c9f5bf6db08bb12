"""A busy process beside the measurements, as on a shared machine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Each ends with the process that started it, even if that process is killed.
PROGRAMS = {
    "spin": "while os.getppid() == parent: pass",
    "memory": "a, b = bytearray(2**28), bytearray(2**28)\nwhile os.getppid() == parent: b[:] = a",
}


def label(kind: str) -> str:
    """Words that each row adds to the device's name.

    So ``compare`` never pairs such a row with one of a quiet machine.
    """
    return f"one busy neighbour ({kind})"


@contextlib.contextmanager
def beside(kind: str | None) -> Iterator[None]:
    """Run one busy process within; none if ``kind`` is none."""
    if kind is None:
        yield
        return
    code = f"import os\nparent = {os.getpid()}\n{PROGRAMS[kind]}"
    with subprocess.Popen([sys.executable, "-S", "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()
