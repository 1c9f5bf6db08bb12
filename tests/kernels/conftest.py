"""Settings of the kernels' tests."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tape_cases
import torch
from triton.runtime.interpreter import InterpretedFunction

from emanet_triton.bench.gpu_check.plan import ON_A_CPU
from emanet_triton.kernels import relaunch, tape
from emanet_triton.kernels.conv import winograd
from emanet_triton.kernels.device import has_onednn
from emanet_triton.kernels.em import eager

TRAITS = tape._traits


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory holds NaN or the largest integer: an element that nobody wrote shows.

    PyTorch only warns about operations that are not deterministic, since a GPU has some.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_kernel_where_a_gpu_runs_none(request, monkeypatch):
    """In a file of ``ON_A_CPU`` no test launches a kernel, so ``test_native`` need not run it."""

    def run(kernel, *_, **__):
        pytest.fail(f"a test of ON_A_CPU launches {kernel.__name__}")

    if request.path.relative_to(Path(__file__).parent).as_posix() in ON_A_CPU:
        monkeypatch.setattr(InterpretedFunction, "run", run)


@pytest.fixture(autouse=True)
def _without_tapes(monkeypatch):
    """On a GPU, too, every call of an operator runs its Python, which tests change."""
    monkeypatch.setattr(tape, "_traits", lambda arguments: None)


@pytest.fixture
def tapes(monkeypatch):
    """Launchers play tapes, and the CPU plays the GPU: its driver knows the stream of a device."""
    driver = SimpleNamespace(
        get_current_stream={3: tape_cases.STREAM}.__getitem__, get_current_device=lambda: 3
    )
    runtime = SimpleNamespace(driver=SimpleNamespace(active=driver))
    monkeypatch.setattr(tape, "triton", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(relaunch, "triton", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(tape, "_traits", TRAITS)
    monkeypatch.setattr(relaunch, "has_fast_way", lambda device: True)
    monkeypatch.setattr(relaunch, "is_watched", lambda: False)


@pytest.fixture
def ordered_products(monkeypatch):
    """Triton's interpreter sums the products of every element in the same order.

    It calls NumPy's matmul, where on some CPUs an element's bits depend on its row.
    """

    def matmul(a, b, dtype):
        return np.multiply(a[..., None], b[..., None, :, :], dtype=dtype).sum(-2)

    monkeypatch.setattr(np, "matmul", matmul)


@pytest.fixture(params=["pytorch", "onednn"])
def products(request, monkeypatch):
    """Who multiplies float32 matrices: the processor decides, but both can on every CPU."""
    if request.param == "onednn" and not has_onednn(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    for module in (winograd, eager):
        monkeypatch.setattr(module, "onednn_beats_mkl", lambda _: request.param == "onednn")
    return request.param


@pytest.fixture
def three_threads():
    """PyTorch set to use three threads."""
    yield from _with_threads(3)


@pytest.fixture
def one_thread():
    """PyTorch set to use one thread, the calling thread."""
    yield from _with_threads(1)


def _with_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
