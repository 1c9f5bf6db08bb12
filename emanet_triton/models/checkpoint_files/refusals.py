"""The exceptions for files that are refused, and how names in files are shown."""

from emanet_triton.errors import one_line

SAVE_WEIGHTS = "load it where it was made, and torch.save(model.state_dict(), ...)"
_SHOWN = 100  # characters of a name


class DamagedError(ValueError):
    """A file violates its format. The message says where."""


class UnsupportedError(ValueError):
    """A file is intact but cannot be used. The message says why and what was expected."""


class DangerousError(ValueError):
    """A pickle names a dangerous function. It was not called. The message is its name."""


def shown(name: str) -> str:
    """A name in a file, cut to 100 characters and without control characters."""
    return one_line(name if len(name) <= _SHOWN else name[:_SHOWN] + "...")
