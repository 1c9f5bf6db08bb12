"""How a run ends early: a hangup counts as Ctrl-C, and no step outlives its run."""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

SIGNALS = signal.SIGHUP, signal.SIGTERM  # a dropped connection; kill
# The second read ends when this process does: then nobody can write any more.
GUARD = 'read -r group; read -r end; kill -s KILL -- "-$group"'


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Within, a hangup and SIGTERM raise ``KeyboardInterrupt``, the first one only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number in SIGNALS if before[number] != signal.SIG_IGN]  # as nohup sets it

    def interrupt(*_: object) -> None:
        for number in ours:  # a terminal that closes sends several
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


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
