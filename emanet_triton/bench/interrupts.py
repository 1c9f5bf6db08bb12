"""Ctrl-C reaches every process of a terminal; only one of them should answer."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
    """Within, Ctrl-C is ignored, and by the processes that start here for as long as they live."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
