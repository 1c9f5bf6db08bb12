"""The commit of this package's repository."""

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
