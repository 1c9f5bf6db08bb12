"""Threads that decode and write beside the network."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any


class Workers:
    """Runs functions in threads: in as many as the system gives, and in none if it gives none.

    ``concurrent.futures`` fails where a thread cannot start, as with ``ulimit -u``. Here the
    caller's thread then does the work.

    Args:
        most: threads.
    """

    def __init__(self, most: int) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(most):
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # can't start new thread
                break
            self._threads.append(thread)

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """The result to come of ``function(*arguments)``."""
        job = Future(), function, arguments
        if self._threads:
            self._jobs.put(job)
        else:
            _run(*job)
        return job[0]

    def map(self, function: Callable, items: Iterable, ahead: int) -> Iterator:
        """``map(function, items)``, at most ``ahead`` results ahead of the reader."""
        waiting: deque[Future] = deque()
        try:
            for item in items:
                waiting.append(self.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for everything that was submitted."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while job := self._jobs.get():
            _run(*job)
            del job  # it holds an image's pixels


def _run(future: Future, function: Callable, arguments: tuple) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
