"""Work that other threads ask for and the main thread does, one piece after the other.

The main thread gets the signals: Ctrl-C interrupts a network there between two operations. A
network in another thread would keep the process alive until it has finished.
"""

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_SECONDS = 0.1  # longest delay of a signal that arrives just before the main thread sleeps


class Desk:
    """Takes work from any thread; the thread that calls ``work`` does it."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()

    def ask(self, function: Callable[..., Any], *arguments: object) -> Future:
        """Hand in a call. The future gets its result or its exception."""
        future: Future = Future()
        self._waiting.put((future, lambda: function(*arguments)))
        return future

    def work(self) -> None:
        """Do all work until Ctrl-C. A call that it interrupts leaves its future open.

        Raises:
            KeyboardInterrupt: by Ctrl-C.
        """
        while True:
            try:
                future, call = self._waiting.get(timeout=_SECONDS)
            except queue.Empty:
                continue
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)
