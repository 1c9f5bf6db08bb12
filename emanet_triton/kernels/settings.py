"""Settings that belong to the process, and that contexts of several threads may change at once."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Held(Generic[T]):
    """A value that contexts hold.

    Attributes:
        value: of the setting.
        restore: puts back what was set before.
        users: the number of contexts.
    """

    value: T
    restore: Callable[[], None]
    users: int = 1


class Setting(Generic[T]):
    """A setting of the process. A call makes a context in which it has a value.

    Contexts that want the same value share it. What was set before is put back when the last of
    them ends. If two threads want different values at once, the later one holds for both.

    Args:
        is_set: whether a value is set.
        set_to: sets a value; returns a function that puts back what was set before.
    """

    def __init__(
        self, is_set: Callable[[T], bool], set_to: Callable[[T], Callable[[], None]]
    ) -> None:
        self._is_set, self._set_to = is_set, set_to
        self._lock = threading.Lock()
        self._held: list[_Held[T]] = []  # the last one is in force

    @contextlib.contextmanager
    def __call__(self, value: T) -> Iterator[None]:
        held = self._enter(value)
        try:
            yield
        finally:
            self._leave(held)

    def _enter(self, value: T) -> _Held[T]:
        with self._lock:
            if self._is_set(value):
                if self._held and self._held[-1].value == value:
                    self._held[-1].users += 1
                    return self._held[-1]
                restore: Callable[[], None] = _nothing
            else:
                restore = self._set_to(value)
            self._held.append(_Held(value, restore))
            return self._held[-1]

    def _leave(self, held: _Held[T]) -> None:
        with self._lock:
            held.users -= 1
            while self._held and not self._held[-1].users:
                self._held.pop().restore()


def _nothing() -> None:
    """Put nothing back: the value had been set before."""
