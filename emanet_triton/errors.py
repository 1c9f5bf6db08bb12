"""The exception for bad input, and how errors and names become texts that are safe to print."""

import unicodedata


class InputError(ValueError):
    """The user gave something that cannot be used: a file, a folder, a name, an option.

    The message names it and says what was expected. Command lines print the message without a
    traceback and exit with code 2.
    """


def printable(text: str) -> str:
    """The text with its control characters escaped, except line breaks and tabs.

    Names of files, keys and arguments may contain sequences that change a terminal.
    """
    return "".join(c if c in "\n\t" or _is_harmless(c) else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The text with all control characters escaped, as a name in a longer message needs it."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def first_line(error: BaseException) -> str:
    """The first line of an error's message; compilers and drivers add long explanations."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def is_of_reloaded(value: object, kind: type) -> bool:
    """Whether a value is of a class that ``kind`` replaced when its module was reloaded."""
    name = (kind.__module__, kind.__qualname__)
    return any(
        own is not kind and (own.__module__, own.__qualname__) == name
        for own in type(value).__mro__
    )


def _is_harmless(character: str) -> bool:
    """Whether a terminal shows the character as it is.

    Control characters, lone surrogates, invisible marks and line separators are not harmless.
    """
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
