"""A limit on the threads that can start, as ``ulimit -u`` and containers set it."""

import threading


def let_threads_start(monkeypatch, most: int) -> None:
    """From now on so many threads can start, then none."""
    left, start = iter(range(most)), threading.Thread.start

    def start_if_left(thread):
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_if_left)
