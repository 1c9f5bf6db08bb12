"""Launchers of kernels that have tapes: a kernel that the CPU runs, and what counts their calls."""

import ctypes
from types import SimpleNamespace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.kernels import relaunch, tape

STREAM = 7
OPTIONS = ("function", "packed")
KERNEL = SimpleNamespace(pre_run_hooks=[])


def floats(address, length: int):
    return (ctypes.c_float * length).from_address(address)


def add(x, y, z, stream, *arguments):
    """A kernel: out = x + factor * y, of the float32 numbers at three addresses."""
    assert (x, y, z, stream) == (2, 1, 1, STREAM)
    assert arguments[:2] == OPTIONS
    x, y, out, length, factor, constant = arguments[2:]
    assert constant == "constant"
    x = x.base if isinstance(x, TensorDescriptor) else x
    sources = [floats(getattr(a, "data_ptr", lambda a=a: a)(), length) for a in (x, y)]
    floats(out, length)[:] = [a + factor * b for a, b in zip(*sources, strict=True)]


def launch(x, y, out, length=None, factor=1.0, kernel=KERNEL, is_ready=True, compiled=None):
    """Launch ``add`` as ``relaunch.start`` does."""
    arguments = x, y, out, out.numel() if length is None else length, factor
    given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    add(2, 1, 1, STREAM, *OPTIONS, *given, "constant")
    ready = relaunch.Ready(compiled, add, OPTIONS, ("constant",)) if is_ready else None
    if note := relaunch._NOTE.get():
        note(kernel, ready, (2,), arguments)


class Operator:
    """A taped operator that counts how often its Python runs."""

    def __init__(self, operator):
        self.calls = 0
        self._operator = operator
        self.taped = tape.taped(self._run)

    def _run(self, *arguments, **keywords):
        self.calls += 1
        return self._operator(*arguments, **keywords)

    def check(self, *arguments, **keywords):
        """The operator returns what it returns without tapes."""
        got = self.taped(*arguments, **keywords)
        want = self._operator(*arguments, **keywords)
        assert type(got) is type(want)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for mine, other in pairs:
            assert torch.equal(mine, other)
            assert mine.stride() == other.stride()
            assert mine.dtype == other.dtype
        return got


def summed(x, y, factor=1.0):
    """x + factor * y by way of two tensors of a workspace."""
    first, second = torch.empty_like(x), x.new_empty(x.shape)
    launch(x, y, first, factor=factor)
    launch(first, torch.zeros(x.shape, device=x.device), second)
    out = torch.empty(x.shape, device=x.device)
    launch(second, first, out, factor=0.0)
    return out


def pair(*shape):
    return torch.rand(*shape), torch.rand(*shape)


def described(x, y, run):
    """x[2:] + y, where a descriptor stands for x; ``run`` starts the kernel."""
    descriptor = TensorDescriptor.from_tensor(x[2:], [1, 4], "nan")
    out = x.new_empty(2, 4)
    arguments = descriptor, y, out, 8, 1.0
    add(
        2, 1, 1, STREAM, *OPTIONS, descriptor.base, y.data_ptr(), out.data_ptr(), 8, 1.0, "constant"
    )
    if note := relaunch._NOTE.get():
        note(KERNEL, relaunch.Ready(None, run, OPTIONS, ("constant",)), (2,), arguments)
    return out
