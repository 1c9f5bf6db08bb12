"""Findings on disk, and the environments that they belong to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emanet_triton.kernels import cache
from emanet_triton.kernels.cache import Cache, digest, environment


@pytest.fixture
def path():
    return Path(os.environ["XDG_CACHE_HOME"]) / "emanet_triton" / "cache.jsonl"


def line(environment: str, key: str, finding: str) -> str:
    return json.dumps({"environment": environment, "key": key, "finding": finding}) + "\n"


def test_findings_outlive_the_process(path):
    assert Cache("cache.jsonl", "here").get("a") is None
    Cache("cache.jsonl", "here").put("a", "cudnn")
    assert Cache("cache.jsonl", "here").get("a") == "cudnn"
    assert Cache("cache.jsonl", "there").get("a") is None


def test_the_later_of_two_findings_counts(path):
    one, two = Cache("cache.jsonl", "here"), Cache("cache.jsonl", "here")
    one.put("a", "cudnn")
    two.put("a", "triton")
    assert Cache("cache.jsonl", "here").get("a") == "triton"
    assert path.read_text() == line("here", "a", "cudnn") + line("here", "a", "triton")
    assert [p.name for p in path.parent.iterdir()] == ["cache.jsonl"]


WRITER = """
import sys
from emanet_triton.kernels.cache import Cache
kept = Cache("cache.jsonl", "here")
sys.stdin.read()  # until all writers stand ready
for i in range(50):
    kept.put(f"{sys.argv[1]} {i}", "x" * 200)
"""


def test_six_processes_lose_nothing(path):
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, str(i)], stdin=subprocess.PIPE) for i in range(6)]
    for writer in writers:
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 6
    kept = Cache("cache.jsonl", "here")
    wanted = [f"{writer} {i}" for writer in range(6) for i in range(50)]
    assert [kept.get(key) for key in wanted] == ["x" * 200] * 300
    # A process that reads the file while another one writes begins with an empty line.
    assert sum(map(bool, path.read_text().splitlines())) == 300


@pytest.mark.parametrize(
    "damaged",
    [
        "{",
        "[]",
        '{"environment": "here", "key": "a"}',
        '{"environment": "here", "key": "a", "finding": 1}',
        '{"environment": "here", "key": "a", "finding": "b", "more": "c"}',
        "\x00",
        "[" * 100_000,
        "9" * 5000,
        b"\xff\xfe",
    ],
    ids=["half", "list", "short", "number", "long", "nul", "deep", "digits", "not-utf-8"],
)
def test_a_damaged_line_is_ignored_and_the_others_count(path, damaged):
    path.parent.mkdir()
    content = damaged if isinstance(damaged, bytes) else damaged.encode()
    path.write_bytes(content + b"\n" + line("here", "b", "triton").encode())
    problem = "1 of 2 lines are damaged and ignored; delete the file to end this warning"
    with pytest.warns(UserWarning, match=rf"^{path}: {problem}$"):
        kept = Cache("cache.jsonl", "here")
    assert (kept.get("a"), kept.get("b")) == (None, "triton")


def test_a_line_after_one_that_was_cut_off(path):
    path.parent.mkdir()
    path.write_text(line("here", "a", "cudnn") + line("here", "b", "cudnn")[:-9])
    with pytest.warns(UserWarning, match="1 of 2 lines are damaged"):
        Cache("cache.jsonl", "here").put("c", "triton")
    with pytest.warns(UserWarning, match="1 of 3 lines are damaged"):
        kept = Cache("cache.jsonl", "here")
    assert [kept.get(key) for key in "abc"] == ["cudnn", None, "triton"]


def test_a_file_that_has_grown_too_long_is_begun_anew(path, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    path.parent.mkdir()
    path.write_text(line("here", "a", "x" * 1000))
    problem = rf"^{path}: ignored, and begun anew: longer than 1000 bytes$"
    with pytest.warns(UserWarning, match=problem):
        kept = Cache("cache.jsonl", "here")
    assert kept.get("a") is None
    kept.put("b", "triton")
    assert path.read_text() == line("here", "b", "triton")


def test_a_planted_link_is_not_followed(path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path.parent.mkdir()
    path.symlink_to(precious)
    with pytest.warns(UserWarning, match=rf"^{path}: ignored: Is a symbolic link$"):
        kept = Cache("cache.jsonl", "here")
    with pytest.warns(UserWarning, match="cannot be written, so the next process repeats"):
        kept.put("a", "cudnn")
    assert precious.read_text() == "precious"


def test_a_file_that_cannot_be_written_is_done_without(path):
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="ignored|the next process repeats the work") as seen:
        kept = Cache("cache.jsonl", "here")
        kept.put("a", "cudnn")
    assert "cannot be written" in str(seen[-1].message)
    assert kept.get("a") == "cudnn"


def test_an_environment_names_device_driver_and_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(cache, "driver_version", lambda: "580.1")
    found = environment(torch.device("cuda", 0))
    for part in (
        "Some GPU, ",
        "driver 580.1, ",
        f"torch {torch.__version__}, ",
        "cudnn ",
        "triton 3",
    ):
        assert part in found
    monkeypatch.setattr(cache, "HAS_TRITON", False)
    assert environment(torch.device("cuda", 0)).endswith("triton none")


def test_a_digest_changes_with_the_sources(tmp_path):
    files = [tmp_path / name for name in ("a.py", "b.py")]
    for file in files:
        file.write_text(file.name)
    before = digest(files)
    assert digest(files[::-1]) == before
    assert len(before) == 8
    files[1].write_text("changed")
    assert digest(files) != before
