"""How a GPU multiplies float32: exactly, or rounded to TF32."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from emanet_triton.kernels.settings import Setting

# An object with an ``fp32_precision``, then the objects that it follows while its own is "none".
Place = tuple[Any, ...]


def cuda_fp32(precision: str) -> contextlib.AbstractContextManager:
    """A context in which a GPU multiplies float32 in ``precision``, ``"ieee"`` or ``"tf32"``.

    By default PyTorch lets cuDNN round to TF32. PyTorch has an old and a new interface for this
    setting, and raises if the two differ, so this function sets both. The settings belong to the
    process, and the end of the context restores them (see ``Setting`` for several threads). One
    difference stays, as with ``torch.backends.cudnn.flags``: a cuDNN setting that nobody had set
    then holds the value that PyTorch showed for it before.
    """
    return _CUDA_FP32(precision)


def _set(precision: str) -> Callable[[], None]:
    """Set a precision; returns a function that restores all settings."""
    before = [(setting, _own(setting, *parents)) for setting, *parents in _places()]
    legacy = _legacy()
    _set_legacy(precision == "tf32", "high" if precision == "tf32" else "highest")
    for setting, _ in before[:-1]:
        setting.fp32_precision = precision

    def restore() -> None:
        _set_legacy(*legacy)
        for setting, earlier in before:
            setting.fp32_precision = earlier

    return restore


@functools.cache  # to find them takes as long as to set them
def _places() -> list[Place]:
    """All settings of CUDA, and the CPU's for matrix products, which the old interface sets too."""
    backends: Any = torch.backends  # has attributes that no type checker sees
    cuda = backends.cudnn, backends
    # backends.mkldnn.fp32_precision shows this setting, but to assign to it sets
    # backends.fp32_precision.
    cpu = backends._FP32Precision("mkldnn", "all"), backends
    return [
        cuda,  # convolutions follow it after ``backends.cudnn.flags`` has ended
        (backends.cudnn.conv, *cuda),
        (backends.cudnn.rnn, *cuda),
        (backends.cuda.matmul, *cuda),
        (backends.mkldnn.matmul, *cpu),
    ]


def _is_set(precision: str) -> bool:
    if any(setting.fp32_precision != precision for setting, *_ in _places()[:-1]):
        return False
    try:
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.get_float32_matmul_precision()
    except RuntimeError:  # the two interfaces differ
        return False
    return allowed == (precision == "tf32",) * 2


_CUDA_FP32 = Setting(_is_set, _set)


def _own(setting: Any, *parents: Any) -> str:
    """The setting's own value; "none" if it follows its parents.

    PyTorch shows the value in effect. If a parent shows the same value, only a change of the parent
    tells whether the setting follows it.
    """
    shown = setting.fp32_precision
    if not parents or shown == "none" or shown != parents[0].fp32_precision:
        return shown
    parent, *grandparents = parents
    before = _own(parent, *grandparents)
    parent.fp32_precision = "ieee" if shown == "tf32" else "tf32"
    own = shown if setting.fp32_precision == shown else "none"
    parent.fp32_precision = before
    return own


def _legacy() -> tuple[bool, str]:
    """cuDNN's ``allow_tf32`` and the matrix products' precision in the old interface.

    PyTorch raises on reading an old setting that differs from the new interface. So this function
    changes the new settings until PyTorch can read the old ones.
    """
    _, conv, rnn, *matmuls = (setting for setting, *_ in _places())
    conv.fp32_precision = rnn.fp32_precision = "tf32"
    for matmul in matmuls:
        matmul.fp32_precision = "ieee"
    try:
        allow = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        allow = False
    return allow, torch.get_float32_matmul_precision()


def _set_legacy(allow: bool, matmul: str) -> None:
    torch.backends.cudnn.allow_tf32 = allow
    torch.set_float32_matmul_precision(matmul)


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Switch autocast off. Meta tensors, which record what a network calls, have no autocast.

    Where it is off already, nothing is done: ``torch.export`` writes no file of a program that
    switches autocast.
    """
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
