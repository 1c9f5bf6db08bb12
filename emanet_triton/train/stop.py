"""Ctrl-C and similar signals during a training: it ends after the iteration."""

import signal
import time
from types import FrameType
from typing import Any

from emanet_triton.command import DEAF_SECONDS

INTERRUPTED = "interrupted"


class Stop:
    """Takes the first SIGINT, SIGTERM or hangup as a request to stop; a later one interrupts.

    A signal in the middle of an iteration would leave weights and running statistics of different
    iterations. Further signals are ignored for some seconds, as in ``command``.

    Attributes:
        asked: whether to stop.
    """

    def __init__(self) -> None:
        self.asked = False
        self._deaf_until = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no hangup
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._deaf_until = True, now + DEAF_SECONDS
        elif now >= self._deaf_until:
            raise KeyboardInterrupt
