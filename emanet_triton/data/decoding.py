"""Decoders of C libraries: strict and silent, and the caller learns what they would have printed.

libjpeg goes on after most damage, leaves a part of the picture grey, and prints a line on the
standard error. This line is the only sign of the damage, so it must be caught. The whole process
shares its standard error, and several threads may decode at once.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import cv2

_Result = TypeVar("_Result")
LOG = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4, or 5
SILENT = 0


def decode_quietly(decode: Callable[[], _Result]) -> tuple[_Result, str]:
    """Call ``decode``, which may be called twice, while C libraries print nothing.

    Several threads may do so at once. Where a message was printed meanwhile, ``decode`` runs once
    more without any other thread in here, so that the message is its own.

    Returns:
        Its result, and what the C libraries printed. The text is empty, and the libraries print it
        as ever, where the C library of the system is not GNU's.
    """
    result, text = _GATE.run(decode, alone=False)
    return _GATE.run(decode, alone=True) if text else (result, text)


class _Gate:
    """Lets threads in, several at once or one alone; the first changes settings, the last resets.

    All settings are of the whole process.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._one_alone = False
        self._settings = ExitStack()

    def run(self, decode: Callable[[], _Result], *, alone: bool) -> tuple[_Result, str]:
        self.enter(alone=alone)
        try:
            begin = _printed_bytes()
            result = decode()
            return result, _printed_since(begin)
        finally:
            self.leave()

    def enter(self, *, alone: bool) -> None:
        with self._changed:
            while self._one_alone or (alone and self._inside):
                self._changed.wait()
            if not self._inside:
                with ExitStack() as settings:  # undone if one of them fails
                    settings.enter_context(_c_messages_kept())
                    settings.enter_context(_opencv_silent())
                    settings.enter_context(_pillow_strict())
                    self._settings = settings.pop_all()
            self._inside += 1
            self._one_alone = alone

    def leave(self) -> None:
        with self._changed:
            self._inside -= 1
            self._one_alone = False
            if not self._inside:
                self._settings.close()
            self._changed.notify_all()


_GATE = _Gate()
if hasattr(os, "register_at_fork"):
    # A child must not begin with changed settings, whose thread it lacks.
    os.register_at_fork(
        before=lambda: _GATE.enter(alone=True),
        after_in_parent=_GATE.leave,
        after_in_child=_GATE.leave,
    )


@contextmanager
def _opencv_silent() -> Iterator[None]:
    level = LOG.getLogLevel()
    LOG.setLogLevel(SILENT)
    try:
        yield
    finally:
        LOG.setLogLevel(level)


@contextmanager
def _pillow_strict() -> Iterator[None]:
    """Many programs let Pillow accept truncated files. Here it refuses them, and logs nothing."""
    from PIL import ImageFile  # not above: the package is imported without Pillow

    log = logging.getLogger("PIL.TiffImagePlugin")
    before = ImageFile.LOAD_TRUNCATED_IMAGES, log.disabled
    ImageFile.LOAD_TRUNCATED_IMAGES, log.disabled = False, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, log.disabled = before


@contextmanager
def _c_messages_kept() -> Iterator[None]:
    """Exchange the variable ``stderr`` of the C library for a stream into memory.

    The descriptor 2 stays, so all that Python and the children of this process print is seen.
    """
    if not messages_are_kept():
        yield
        return
    variable = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr")
    stream, descriptor = _memory(os.getpid())
    before, variable.value = variable.value, stream
    try:
        yield
    finally:
        variable.value = before
        os.ftruncate(descriptor, 0)


def _printed_bytes() -> int:
    return os.fstat(_memory(os.getpid())[1]).st_size if messages_are_kept() else 0


def _printed_since(begin: int) -> str:
    size = _printed_bytes() - begin
    if size <= 0:
        return ""
    return os.pread(_memory(os.getpid())[1], size, begin).decode(errors="replace")


@functools.cache
def messages_are_kept() -> bool:
    """Whether ``decode_quietly`` returns what C libraries print: the C library is GNU's."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


@functools.cache
def _memory(process: int) -> tuple[int, int]:
    """A C stream without buffer that appends to a file in memory, and the file's descriptor.

    It stays open: a library of another thread may still be about to print into it. Each process
    has its own, or a child would read what its parent printed.
    """
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_char_p)
    libc.setbuf.restype, libc.setbuf.argtypes = None, (ctypes.c_void_p, ctypes.c_char_p)
    descriptor = os.memfd_create(f"messages of {process}")
    stream = libc.fdopen(descriptor, b"a")
    libc.setbuf(stream, None)
    return stream, descriptor
