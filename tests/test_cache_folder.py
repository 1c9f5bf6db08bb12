"""The place of the cache, and the folder that replaces it if it cannot be written."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from emanet_triton import cache_folder as cache_module
from emanet_triton.cache_folder import cache_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, and a home without a cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "tmp"


@pytest.mark.parametrize("given", [None, "", "relative"])
def test_the_cache_lies_at_home(temporary, monkeypatch, given):
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert cache_folder() == temporary.parent / "home" / ".cache" / "emanet_triton"


def test_the_cache_lies_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "emanet_triton"


def private(temporary: Path) -> Path:
    return temporary / f"emanet_triton-{os.getuid()}"


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_the_cache_is_a_private_temporary_folder(temporary, monkeypatch, home):
    def nobody(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    cache_module._instead_of.cache_clear()
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    with pytest.warns(UserWarning, match="is used instead") as seen:
        assert cache_folder() == cache_folder() == private(temporary) / "emanet_triton"
    assert [str(warning.message) for warning in seen] == [
        f"~/.cache/emanet_triton: cannot be written; {private(temporary)} is used instead; "
        "set XDG_CACHE_HOME to choose another folder"
    ]
    assert stat.S_IMODE(private(temporary).stat().st_mode) == 0o700


def test_a_cache_of_somebody_else_is_done_without(temporary, monkeypatch):
    (temporary.parent / "home").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.warns(UserWarning, match=r"^.*/home/.cache/emanet_triton: cannot be written; "):
        assert cache_folder() == private(temporary) / "emanet_triton"


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_planted_temporary_folder_is_not_used(temporary, monkeypatch, kind, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    if kind == "link":
        private(temporary).symlink_to(tmp_path)
    elif kind == "open":
        private(temporary).mkdir()
        private(temporary).chmod(0o777)
    else:
        private(temporary).touch()
    with pytest.warns(UserWarning, match="; /dev/null is used instead"):
        assert cache_folder() == Path("/dev/null/emanet_triton")
