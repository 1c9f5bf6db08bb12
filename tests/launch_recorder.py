"""A pytest plugin that runs tests without their kernels and records which kernels they launch.

    TRITON_INTERPRET=0 python -m pytest -p launch_recorder --record FILE.json tests/kernels

With ``TRITON_INTERPRET=1`` kernels are launched on the CPU. With ``TRITON_INTERPRET=0`` the meta
device stands for a GPU of sm_90, and every launch ends where Triton would compile the kernel. A
tensor there has no values: code that reads values gets zeros and True, so that a test goes on to
its next launch.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ON_META = os.environ["TRITON_INTERPRET"] == "0"
PLACE = "meta" if ON_META else "cpu"


@dataclass
class Recorded:
    """What one test did.

    Attributes:
        kernels: names of the launched kernels.
        elsewhere: names of kernels launched with a tensor that is not on the device.
        compiled: how many kernels Triton would have compiled for it.
        outcome: "passed", "failed" or "skipped".
        error: type and message of what it raised.
    """

    kernels: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    compiled: int = 0
    outcome: str = "passed"
    error: str = ""


class Recorder:
    """Hooks of pytest and of Triton's launches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: defaultdict[str, Recorded] = defaultdict(Recorded)
        self.current = Recorded()  # while modules are imported
        self.compiled: set[tuple[str, str]] = set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.current = self.tests[nodeid]

    def pytest_runtest_makereport(self, call: pytest.CallInfo) -> None:
        if call.excinfo is None:
            return
        skipped = call.excinfo.errisinstance(pytest.skip.Exception)
        self.current.outcome = "skipped" if skipped else "failed"
        self.current.error = f"{call.excinfo.typename}: {call.excinfo.value}"

    def pytest_sessionfinish(self) -> None:
        tests = {name: asdict(test) for name, test in self.tests.items()}
        self.path.write_text(json.dumps(tests))

    def launched(self, kernel: str, arguments: tuple) -> None:
        self.current.kernels.append(kernel)
        tensors = [getattr(argument, "base", argument) for argument in arguments]
        if any(isinstance(t, Tensor) and t.device.type != PLACE for t in tensors):
            self.current.elsewhere.append(kernel)

    def compile(self, kernel: str, key: str) -> None:
        if (kernel, key) not in self.compiled:
            self.compiled.add((kernel, key))
            self.current.compiled += 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, required=True, metavar="FILE.json")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before a ``conftest.py`` imports the operators."""
    recorder = Recorder(early_config.known_args_namespace.record)
    early_config.pluginmanager.register(recorder)
    launches = JITFunction if ON_META else InterpretedFunction
    run = launches.run

    def record(self, *args, grid, warmup, **kwargs):
        recorder.launched(self.fn.__name__, args)
        if ON_META:
            run(self, *args, grid=grid, warmup=True, **kwargs)

    launches.run = record
    torch.compile = lambda function, **_: function  # launches the same kernels, without the wait
    subprocess.Popen.__init__ = _skip_processes
    if ON_META:
        JITFunction._do_compile = lambda self, key, *_: recorder.compile(self.fn.__name__, key)
        _make_meta_a_gpu()


def _skip_processes(*_, **__) -> None:
    pytest.skip("starts a process, where no launch is recorded")


def _make_meta_a_gpu() -> None:
    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    _run_operators_on_meta()
    _accept_meta_for_triton()
    is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    device = importlib.import_module("device")
    torch.cuda.is_available = is_available
    device.DEVICE = "meta"
    _let_values_be_read()


class Driver:
    """All that Triton asks a GPU before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _run_operators_on_meta() -> None:
    """Import the package so that its operators do on meta what they do on a GPU.

    For meta tensors PyTorch would only call the functions that make results of the right shape.
    """
    assert "emanet_triton" not in sys.modules, "imported before its operators could be changed"
    implement, register_fake = torch.library.Library.impl, torch.library.register_fake
    runs = {}

    def remember(library, name, run, key="", **options):
        runs[name] = run
        implement(library, name, run, key, **options)

    def register_both(name, fake=None, **options):
        registered = register_fake(name, fake, **options)
        namespace, _, operator = str(name).partition("::")
        if namespace == "emanet_triton":
            implement(options["lib"], operator, runs[operator], "Meta", allow_override=True)
        return registered

    torch.library.Library.impl, torch.library.register_fake = remember, register_both
    for operators in ("em.op", "conv.op", "pool.op", "resample.op"):
        importlib.import_module(f"emanet_triton.kernels.{operators}")
    torch.library.Library.impl, torch.library.register_fake = implement, register_fake


def _accept_meta_for_triton() -> None:
    """``triton_kernels`` takes the meta device for a GPU, wherever it has been imported."""
    original = importlib.import_module("emanet_triton.kernels.device").triton_kernels

    def triton_kernels(stem: str, tensor: Tensor):
        if not tensor.is_meta:
            return original(stem, tensor)
        return contextlib.nullcontext(importlib.import_module(f"emanet_triton.kernels.{stem}"))

    for module in list(sys.modules.values()):
        if getattr(module, "triton_kernels", None) is original:
            module.triton_kernels = triton_kernels
    torch.library.opcheck = lambda operator, arguments: operator(
        *arguments
    )  # it skips meta tensors


def _let_values_be_read() -> None:
    def zeros(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    readings = {
        "cpu": zeros,
        "item": lambda tensor: zeros(tensor).item(),
        "tolist": lambda tensor: zeros(tensor).tolist(),
        "__bool__": lambda tensor: True,
    }
    for name, read in readings.items():
        setattr(Tensor, name, _on_meta(read, getattr(Tensor, name)))
    equal = torch.equal

    def is_equal(a: Tensor, b: Tensor) -> bool:
        if a.device != b.device:
            raise RuntimeError(f"torch.equal of tensors on {a.device} and {b.device}")
        return a.is_meta or equal(a, b)

    torch.equal = is_equal
    enter = torch.autocast.__init__  # does not accept meta

    def autocast(self, device_type, *args, **kwargs):
        enter(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = autocast


def _on_meta(read, original):
    def method(tensor: Tensor, *args, **kwargs):
        return read(tensor) if tensor.is_meta else original(tensor, *args, **kwargs)

    return method
