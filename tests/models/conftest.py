"""Fixtures for downloads."""

from pathlib import Path

import pytest
from download_server import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


@pytest.fixture
def destination(tmp_path) -> Path:
    return tmp_path / "hub" / "checkpoints" / "file.pth"
