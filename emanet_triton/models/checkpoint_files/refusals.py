"""Why a file is refused, and how its names are shown."""

from emanet_triton.errors import one_line

_SHOWN = 100  # characters of a name


class DamagedError(ValueError):
    """A file does not keep to its format; the message says where."""


class UnsupportedError(ValueError):
    """A sound file that cannot be used; the message says why and what was expected."""


class DangerousError(ValueError):
    """A pickle names a function that could harm; nothing was called. The message is its name."""


def shown(name: str) -> str:
    """A name that stands in a file, cut to a bearable length and without control characters."""
    return one_line(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")
