"""Fixtures for files of a data set."""

import pytest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.png"
