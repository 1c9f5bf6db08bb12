"""No step of a run outlives it."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator

# The second read ends when this process does: then nobody can write any more.
GUARD = 'read -r group; read -r end; kill -s KILL -- "-$group"'


@contextlib.contextmanager
def guard() -> Iterator[Callable[[int], None]]:
    """Yields a function: the process group that it gets ends with this process, even by SIGKILL.

    After the block the group may live on.
    """
    process = subprocess.Popen(
        ["sh", "-c", GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a hangup of the terminal must not end it
    )

    def watch(group: int) -> None:
        process.stdin.write(f"{group}\n".encode())
        process.stdin.flush()

    try:
        yield watch
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
