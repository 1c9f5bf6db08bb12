"""Findings on disk, and what they are kept by."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from emanet_triton.kernels import cache
from emanet_triton.kernels.cache import Cache, digest, environment


@pytest.fixture
def path():
    return Path(os.environ["XDG_CACHE_HOME"]) / "emanet_triton" / "cache.json"


def test_findings_outlive_the_process(path):
    assert Cache("cache.json", "here").get("a") is None
    Cache("cache.json", "here").put("a", "cudnn")
    assert Cache("cache.json", "here").get("a") == "cudnn"
    assert Cache("cache.json", "there").get("a") is None


def test_two_processes_keep_what_both_found(path):
    one, two = Cache("cache.json", "here"), Cache("cache.json", "here")
    one.put("a", "cudnn")
    two.put("b", "triton")
    assert json.loads(path.read_text()) == {"here": {"a": "cudnn", "b": "triton"}}
    assert [p.name for p in path.parent.iterdir()] == ["cache.json"]


def test_two_threads_keep_what_both_found(path, monkeypatch):
    one, two = Cache("cache.json", "here"), Cache("cache.json", "here")
    read = Cache._read

    def slow(self):
        found = read(self)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(Cache, "_read", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Cache.put, (one, two), "ab", ("cudnn", "triton")))
    assert json.loads(path.read_text()) == {"here": {"a": "cudnn", "b": "triton"}}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"here": 1}', '{"here": {"key": 1}}', "\x00", "[" * 100_000],
    ids=["empty", "half", "list", "number", "number-inside", "not-text", "deep"],
)
def test_a_broken_file_is_ignored_and_replaced(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match=f"{path}: ignored, and replaced when there is something"):
        Cache("cache.json", "here").put("a", "cudnn")
    assert json.loads(path.read_text()) == {"here": {"a": "cudnn"}}


def test_a_file_that_cannot_be_written_is_done_without(path):
    path.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="ignored|the next process repeats the work") as seen:
        kept = Cache("cache.json", "here")
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
