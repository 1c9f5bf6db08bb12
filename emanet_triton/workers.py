"""Threads that decode images and write pictures while the network runs."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any

_Job = tuple[Future, Callable, tuple]  # a result to come, a function and its arguments


class Workers:
    """Runs functions in as many threads as the system allows.

    ``concurrent.futures`` fails if a thread cannot start, for example because of ``ulimit -u``.
    Here the caller's thread does the work if no thread can start.

    Args:
        most: the number of threads to start.
    """

    def __init__(self, most: int) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        for _ in range(most):
            thread = threading.Thread(target=self._work, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # can't start new thread
                break
            self._threads.append(thread)

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Start ``function(*arguments)``, and return a future for its result."""
        job: _Job = Future(), function, arguments
        if self._threads:
            self._jobs.put(job)
        else:
            _run(*job)
        return job[0]

    def map(self, function: Callable, items: Iterable, ahead: int) -> Generator:
        """Yield ``map(function, items)``; threads work on at most ``ahead`` items in advance."""
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

    def __exit__(self, *error: object) -> None:
        """Wait until all submitted calls have ended."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while job := self._jobs.get():
            _run(*job)
            del job  # because the job keeps the pixels of an image alive


def _run(future: Future, function: Callable, arguments: tuple) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(*arguments))
    except BaseException as error:
        future.set_exception(error)
