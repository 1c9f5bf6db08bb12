"""Triton's interpreter, without its search for builtin functions at every call of a function.

Before a kernel, and before each function that a kernel calls, the interpreter searches all members
of ``triton.language`` for the builtin functions, which it replaces. That search took a third of the
time of the kernels' tests. Here it is done once; what is replaced, and when, stays the same.
"""

import inspect
from functools import cache
from types import ModuleType, SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


@cache
def builtin_names(owner: ModuleType | type) -> list[str]:
    """Names of the builtin functions, while the interpreter has not replaced them yet."""
    return [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]


def builtins(owner: ModuleType | type) -> list[tuple[str, object]]:
    """All of ``inspect.getmembers`` that the interpreter replaces."""
    return [(name, getattr(owner, name)) for name in builtin_names(owner)]


def install() -> None:
    interpreter.inspect = SimpleNamespace(**vars(inspect) | {"getmembers": builtins})
