"""No step outlives its stage."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator

# The second read ends when this process ends, because then nobody can write any more.
GUARD = 'read -r group; read -r end; kill -s KILL -- "-$group"'


@contextlib.contextmanager
def guard() -> Iterator[Callable[[int], None]]:
    """Yields a function that takes a process group: the group ends with this process.

    Even if this process ends by SIGKILL. After the block the group may live on.
    """
    process = subprocess.Popen(
        ["sh", "-c", GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a hangup of the terminal must not end it
        text=True,
    )

    def watch(group: int) -> None:
        print(group, file=process.stdin, flush=True)

    with process:
        try:
            yield watch
        finally:
            process.kill()
