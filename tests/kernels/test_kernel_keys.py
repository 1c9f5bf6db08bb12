"""Kernels keep their places in Triton's cache, in whatever order a process compiles them."""

import os
import subprocess
import sys

from emanet_triton.bench.ahead_of_time.gates import IN_GLUON

# Prints the key of each function that no other calls, of each kernel; "reversed": the last first.
KEYS = """
import importlib, pkgutil, sys
import triton
from emanet_triton import kernels
found = {}
for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
    for value in vars(importlib.import_module(module.name)).values():
        if isinstance(value, triton.JITFunction):
            found[value.__module__, value.__name__] = value
called = {name for function in found.values() for name in function.fn.__code__.co_names}
names = [name for name in found if name[1] not in called]
names.sort(reverse=sys.argv[1] == "reversed")
keys = {name: found[name].cache_key for name in names}
for name in sorted(keys):
    print(*name, keys[name])
"""


def test_no_order_changes_a_key():
    # Triton 3.6 makes a constant of a module part of a kernel's key, if the kernel calls a function
    # that uses the constant and that another kernel has called before. Later versions do not, so
    # this test can fail with Triton 3.6 only.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    forwards, backwards = (
        subprocess.check_output([sys.executable, "-c", KEYS, order], env=environment, text=True)
        for order in ("sorted", "reversed")
    )
    assert forwards == backwards
    for kernel in IN_GLUON:
        assert f" {kernel} " in forwards
