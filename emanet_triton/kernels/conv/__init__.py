"""The operators are in ``op``. Code that imports them from here, where they were, still works."""

import importlib

_NAMES = ("conv_bias_act", "pack_weight")


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.op"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
