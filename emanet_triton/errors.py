"""The exception for bad input, and how errors and names become texts that are safe to print."""

import unicodedata


class InputError(ValueError):
    """Something that the user gave is not usable: a file, a folder, a name, an option.

    The message is complete in itself: it names the thing and says what was expected.
    Command lines print it without a traceback and exit with code 2.
    """


def printable(text: str) -> str:
    """The text with its control characters escaped, but for line breaks and tabs.

    Names of files, keys and arguments may hold sequences that rewrite a terminal.
    """
    return "".join(c if c in "\n\t" or _is_harmless(c) else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """The text with its line breaks and tabs escaped as well: for a name in a longer message."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def first_line(error: BaseException) -> str:
    """What an error says, without the explanations that compilers and drivers add."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
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
    """Whether a terminal shows the character itself.

    It is no control character, no lone surrogate, no invisible mark and no line separator.
    """
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
