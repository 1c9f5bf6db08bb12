"""Settings shared by all tests."""

import importlib
import os
import signal

import fake_cuda
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, later
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests interrupt themselves
importlib.import_module("quick_interpreter").install()  # it imports triton


@pytest.fixture(autouse=True)
def _private_caches(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's caches."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(cache / "hub"))


@pytest.fixture(autouse=True)
def _same_signal_handlers():
    """A handler that a test left behind would change what later tests see."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for torch.cuda's streams, events and graphs."""
    return fake_cuda.install(monkeypatch)
