"""The one exception that command lines turn into a message and exit code 2."""


class InputError(ValueError):
    """Something that the user gave is not usable: a file, a folder, a name, an option.

    The message is complete in itself: it names the thing and says what was expected.
    Command lines print it without a traceback and exit with code 2.
    """
