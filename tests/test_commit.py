"""The commit of this package's repository."""

import re
import subprocess

import pytest

from emanet_triton import versions
from emanet_triton.versions import commit


@pytest.mark.parametrize(
    ("written", "said"), [("54dbbc2-dirty\n", "54dbbc2-dirty"), (None, "unknown")]
)
def test_the_commit_of_a_copy_without_history(written, said, tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    if written:
        (tmp_path / "COMMIT").write_text(written)
    assert commit() == said


def test_the_commit_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def in_git(folder, *command):
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, *command], cwd=folder, check=True)


def test_a_repository_around_the_package_is_not_its_own(tmp_path, monkeypatch):
    in_git(tmp_path, "init", "--quiet")
    in_git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "x")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", commit())
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(versions, "ROOT", installed)
    assert commit() == "unknown"
