"""The one exception that command lines turn into a message and exit code 2; errors in short."""


class InputError(ValueError):
    """Something that the user gave is not usable: a file, a folder, a name, an option.

    The message is complete in itself: it names the thing and says what was expected.
    Command lines print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What an error says, without the explanations that compilers and drivers add."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
