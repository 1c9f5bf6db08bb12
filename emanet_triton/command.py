"""The frame of every command line: arguments, messages, signals and exit codes."""

import argparse
import errno
import io
import os
import signal
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import IO, NoReturn

from emanet_triton.cores import MOST_THREADS
from emanet_triton.errors import InputError, first_line, printable
from emanet_triton.heap import ask_for_large_pages

DEAF_SECONDS = 3.0  # further signals are ignored for so long after a signal
_MOST = 2**32 - 1  # of a whole number; libraries refuse larger ones, each with its own error
_MOST_PIXELS = 2**14  # of a side of an image
SCRIPT = "emanet-triton"  # the console script
FAILED = 2  # the exit code for errors that the user can correct, and for an interruption


class Parser(argparse.ArgumentParser):
    """A parser that raises ``InputError``; the caller prints the message and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse_known_args(  # type: ignore[override]  # argparse's overloads have a type variable
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments as argparse does.

        Raises:
            InputError: an argument is not valid or holds a control character.
        """
        args = sys.argv[1:] if args is None else list(args)
        for argument in args:
            if argument.endswith("\r"):
                raise InputError(
                    f"argument {argument!a} ends with a carriage return: expected a script with "
                    "the line endings of Unix, not of Windows"
                )
            if any(unicodedata.category(character) == "Cc" for character in argument):
                raise InputError(f"argument {argument!a} holds a control character")
        return super().parse_known_args(args, namespace)


def program(command: str = "", module: str = "") -> str:
    """How the user has called a command, for its usage line and for hints.

    Args:
        command: the command's module below this package, and its subcommand if it has one: "eval",
            "bench report". If empty, the program that has all commands.
        module: of the command, if it has another name than the command.

    Returns:
        For "eval": "emanet-triton eval", "python -m emanet_triton eval" or, unless the program of
        all commands runs, "python -m emanet_triton.eval".
    """
    called = PurePath(next(iter(sys.argv), ""))
    if called.parts[-2:] == ("emanet_triton", "__main__.py"):
        return f"python -m emanet_triton {command}".rstrip()
    if called.stem == SCRIPT or not command:
        return f"{SCRIPT} {command}".rstrip()
    return f"python -m emanet_triton.{module or command}"


def count(text: str) -> int:
    """A whole number from 1 to 2**32 - 1, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    return _whole(text, least=1)


def whole(text: str) -> int:
    """A whole number from 0 to 2**32 - 1, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    return _whole(text, least=0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        expected = f"a whole number of at least {least}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    if int(text) > _MOST:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST}, got {text}")
    return int(text)


def number(text: str, expected: str, holds: Callable[[float], bool]) -> float:
    """A number that fulfils a condition, for the ``type`` of an option.

    Args:
        text: the option's value.
        expected: the condition in words.
        holds: the condition.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    return value


def share(text: str) -> float:
    """A number of 0 to 1, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    return number(text, "a number of 0 to 1", lambda value: 0 <= value <= 1)


def below_one(text: str) -> float:
    """A number of at least 0 and less than 1, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    return number(text, "a number of at least 0 and less than 1", lambda value: 0 <= value < 1)


def size(text: str, expected: str = "two sizes such as 512x1024") -> tuple[int, int]:
    """Two sizes in pixels with an x between them, in their order, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is something else than ``expected``, or a side is 0 or
            above the limit.
    """
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text}'")
    if not all(0 < int(side) <= _MOST_PIXELS for side in (first, second)):
        limits = f"sides of 1 to {_MOST_PIXELS} pixels"
        raise argparse.ArgumentTypeError(f"expected {limits}, got '{text}'")
    return int(first), int(second)


# Help of options --threads: their default, and the whole text where torchrun may start a command.
THREADS = "default: OMP_NUM_THREADS if it is set, else one for each core that this process may use"
RANK_THREADS = (
    f"threads of the network on a CPU; {THREADS}; several processes of torchrun ignore the "
    "variable and share the cores"
)


def thread_count(text: str) -> int:
    """A number of threads that a process can start, as the ``type`` of an option.

    Raises:
        argparse.ArgumentTypeError: the text is no such number.
    """
    threads = count(text)
    if threads > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS} threads, got {threads}")
    return threads


def say(text: str = "") -> None:
    """Print to standard output."""
    print(printable(text), flush=True)


def complain(text: str) -> None:
    """Print to standard error."""
    if sys.stderr is not None:
        print(printable(text), file=sys.stderr, flush=True)


def answer(main: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Call ``main`` and return its exit code, or print a message and return 2.

    The message reports bad input (``InputError``) or an interruption (Ctrl-C).
    """
    try:
        return main()
    except InputError as error:
        complain(f"error: {error}")
    except KeyboardInterrupt:
        complain(interrupted)
    return FAILED


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command line as a program, and exit.

    SIGTERM and a hangup act like Ctrl-C. A signal that was ignored before stays ignored: a shell
    ignores Ctrl-C for a command in the background, and nohup ignores a hangup. The work goes on if
    a standard stream is closed or full, or if its reader has ended. The exit code is 2 if standard
    output cannot be written. A reader that ends early (``| head``) is no error. PyTorch asks the
    system for large pages.
    """
    ask_for_large_pages()
    _handle_signals()
    _open_closed_streams()
    output, errors = _Stream(sys.stdout), _Stream(sys.stderr)
    sys.stdout, sys.stderr = output, errors
    warnings.showwarning = lambda message, *_: complain(f"note: {first_line(message)}")
    code = main()
    output.flush()
    if output.problem and output.problem.errno != errno.EPIPE:
        complain(f"error: standard output: cannot be written ({output.problem.strerror})")
        code = code or FAILED
    sys.exit(code)


class _Stream:
    """A standard stream that drops a text if it cannot write it.

    Attributes:
        problem: the first error of the stream, or ``None``.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115, PTH123 (for the process)
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")
        self.problem: OSError | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self.problem = self.problem or error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also takes the text that is still buffered
            os.close(nowhere)


class _Interrupt:
    """A signal handler that raises KeyboardInterrupt, but not again within some seconds.

    torchrun passes a Ctrl-C on to its ranks, which have already received it from the terminal. A
    terminal that closes sends several hangups.
    """

    def __init__(self) -> None:
        self._deaf_until = 0.0

    def __call__(self, *_: object) -> None:
        if time.monotonic() >= self._deaf_until:
            self._deaf_until = time.monotonic() + DEAF_SECONDS
            raise KeyboardInterrupt


def _handle_signals() -> None:
    interrupt = _Interrupt()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no hangup
        if number and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _open_closed_streams() -> None:
    """Open closed standard streams, so that no other file gets their numbers.

    Libraries write messages to these numbers.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(nowhere, True)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(nowhere, number)
    if nowhere > 2:
        os.close(nowhere)
