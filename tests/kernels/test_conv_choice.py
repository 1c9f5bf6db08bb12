import json

import pytest
import torch

from emanet_triton.kernels import conv_choice

CPU = torch.device("cpu")
KEY = "a convolution"


class Call:
    """A provider: returns its output and counts how often it was asked."""

    def __init__(self, output=None, error=None):
        self.output = torch.ones(3) if output is None else output
        self.error = error
        self.count = 0

    def __call__(self):
        self.count += 1
        if self.error:
            raise self.error
        return self.output


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which the last provider to be timed is the fastest; gives what it timed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EMANET_TRITON_CONV_SEARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    timed = []

    def time(run):
        timed.append(run)
        return -len(timed)

    monkeypatch.setattr(conv_choice, "_time", time)
    conv_choice._cache.cache_clear()
    yield timed
    conv_choice._cache.cache_clear()


def choose(search=True, key=KEY, **candidates):
    candidates = candidates or {"cudnn": Call(), "triton": Call()}
    return conv_choice.choose(key, CPU, candidates, search=search)


def cache_file(tmp_path):
    return tmp_path / "emanet_triton" / "conv_choice.json"


def test_the_fastest_is_found_once_and_kept_on_disk(gpu, tmp_path):
    assert choose() == "triton"
    assert choose() == "triton"
    assert len(gpu) == 2
    conv_choice._cache.cache_clear()  # as in another process
    assert choose() == "triton"
    assert len(gpu) == 2
    [(environment, winners)] = json.loads(cache_file(tmp_path).read_text()).items()
    assert winners == {KEY: "triton"}
    for part in ("Some GPU", "driver ", f"torch {torch.__version__}", "cudnn ", "triton "):
        assert part in environment


def test_another_environment_measures_again(gpu, monkeypatch, tmp_path):
    choose()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    conv_choice._cache.cache_clear()
    assert choose(key="something else") == "triton"
    assert len(gpu) == 4
    content = json.loads(cache_file(tmp_path).read_text())
    assert sorted(map(list, content.values())) == [[KEY], ["something else"]]


def test_the_search_can_be_switched_off(gpu, monkeypatch, tmp_path):
    assert choose(search=False) == "cudnn"
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    assert choose() == "cudnn"
    assert not gpu
    assert not cache_file(tmp_path).exists()


def test_nothing_is_measured_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    candidates = {"cudnn": Call(), "triton": Call()}
    assert choose(**candidates) == "cudnn"
    assert not gpu
    assert [call.count for call in candidates.values()] == [0, 0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(**candidates) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(**candidates) == "triton"


def test_the_table_comes_first(gpu, monkeypatch):
    monkeypatch.setitem(conv_choice.MEASURED, "Some GPU", {KEY: "triton"})
    assert choose(search=False) == "triton"
    assert choose(cudnn=Call(), torch=Call()) == "torch"  # not a candidate: measured
    assert len(gpu) == 2


def test_nothing_has_been_measured_for_the_table_yet():
    assert conv_choice.MEASURED == {}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Call(error=RuntimeError("no registers")), "no registers"),
        (Call(torch.tensor([1, 1, 1.1])), r"differs by 0.1, where 0.00391 is allowed"),
        (Call(torch.tensor([1, 1, torch.nan])), "differs by nan"),
    ],
    ids=["fails", "differs", "nan"],
)
def test_a_candidate_that_is_wrong_is_left_out(gpu, broken, reason):
    with pytest.warns(UserWarning, match=f"provider triton is left out for {KEY}: {reason}"):
        assert choose(cudnn=Call(), triton=broken) == "cudnn"
    assert len(gpu) == 1


def test_without_memory_the_default_is_taken_and_nothing_kept(gpu, tmp_path):
    broken = Call(error=torch.OutOfMemoryError("too little"))
    with pytest.warns(UserWarning, match="no memory to measure a convolution, so cudnn it is"):
        assert choose(cudnn=Call(), triton=broken) == "cudnn"
    assert not cache_file(tmp_path).exists()
    assert choose() == "triton"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"here": 1}', '{"here": {"key": 1}}', "\x00"],
)
def test_a_broken_cache_is_ignored_and_replaced(gpu, tmp_path, content):
    path = cache_file(tmp_path)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(UserWarning, match=f"{path}: ignored, and written anew"):
        assert choose() == "triton"
    assert [*json.loads(path.read_text()).values()] == [{KEY: "triton"}]


def test_a_provider_that_is_gone_is_not_taken_from_the_cache(gpu):
    choose(cudnn=Call(), gone=Call())
    assert choose() == "triton"


def test_a_cache_that_cannot_be_written_is_done_without(gpu, tmp_path):
    (tmp_path / "emanet_triton").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="ignored|measured again next time") as warned:
        assert choose() == "triton"
    assert "measured again next time" in str(warned[-1].message)
    assert choose() == "triton"
    assert len(gpu) == 2


def test_two_processes_keep_what_both_found(tmp_path):
    path = tmp_path / "cache.json"
    one, two = conv_choice.Cache(path, "here"), conv_choice.Cache(path, "here")
    one.put("a", "cudnn")
    two.put("b", "triton")
    assert json.loads(path.read_text()) == {"here": {"a": "cudnn", "b": "triton"}}
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]
