import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv.exact import ConvCheck

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
KEY = "a convolution"
ONES = torch.ones(1, 1, 1, 3)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


class Call:
    """A backend: returns its output and counts how often it was asked."""

    def __init__(self, *output, error=None):
        self.output = torch.tensor(output or [1.0, 1.0, 1.0]).view(1, 1, 1, 3)
        self.error = error
        self.count = 0

    def __call__(self):
        self.count += 1
        if self.error:
            raise self.error
        return self.output


def make_check(plain=None):
    """The check of a convolution whose output is all ones."""
    return ConvCheck(
        ONES, None, ONES.shape, ONES.dtype, 1, 0, False, lambda rows: rows, plain or Call()
    )


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which the backend that is timed last is the fastest; yields the timed names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EMANET_TRITON_CONV_SEARCH", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        choice, "is_capturing", lambda device: torch.cuda.is_current_stream_capturing()
    )
    monkeypatch.setattr(
        choice, "environment", lambda device: f"{torch.cuda.get_device_name(device)}, driver 1"
    )
    timed = []

    def seconds(name, key, device, run):
        timed.append(name)
        return -len(timed)

    monkeypatch.setattr(choice, "_seconds", seconds)
    monkeypatch.setattr(choice, "_HOPELESS", set())
    monkeypatch.setattr(choice, "_NOT_FINITE", Counter())
    choice._cache.cache_clear()
    yield timed
    choice._cache.cache_clear()


def choose(key=KEY, check=None, checks=None, **candidates):
    candidates = candidates or {"cudnn": Call(), "torch": Call(), "triton": Call()}
    checks = checks or [check or make_check()]
    return choice.choose(key, CPU, candidates, "torch", lambda: checks)


def cache_file(tmp_path):
    return tmp_path / "emanet_triton" / "conv_choice.jsonl"


def test_the_fastest_is_found_once_and_kept_on_disk(gpu, tmp_path):
    assert choose() == "triton"
    assert choose() == "triton"
    choice._cache.cache_clear()  # as in another process
    assert choose() == "triton"
    assert gpu == ["cudnn", "torch", "triton"]
    kept = json.loads(cache_file(tmp_path).read_text())
    assert (kept["key"], kept["finding"]) == (KEY, "triton")
    assert kept["environment"].startswith("Some GPU, driver ")


@pytest.mark.parametrize("what", ["device", "sources"])
def test_another_environment_measures_again(gpu, monkeypatch, tmp_path, what):
    choose()
    if what == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    else:
        monkeypatch.setattr(choice, "digest", lambda files: "12345678")
    choice._cache.cache_clear()
    assert choose() == "triton"
    assert len(gpu) == 6
    kept = [json.loads(line) for line in cache_file(tmp_path).read_text().splitlines()]
    assert [(line["key"], line["finding"]) for line in kept] == [(KEY, "triton")] * 2


def test_the_sources_of_the_kernels_and_their_tiles_are_digested(gpu, monkeypatch):
    digested = []
    monkeypatch.setattr(choice, "digest", lambda files: str(digested.extend(files)))
    choose()
    names = {file.name for file in digested}
    assert {"implicit_gemm.py", "expand_reduce.py", "tiles.py", "tile.py"} <= names
    assert {"eager.py", "op.py"} <= names


def test_each_package_of_kernels_has_its_own_file_and_sources(gpu, monkeypatch, tmp_path):
    digested = []
    monkeypatch.setattr(choice, "digest", lambda files: str(digested.extend(files)))
    candidates = {"triton": Call(), "one-pass-16": Call()}
    for _ in range(2):
        found = choice.choose(KEY, CPU, candidates, "triton", lambda: [make_check()], "em")
        assert found == "one-pass-16"
    assert gpu == ["triton", "one-pass-16"]
    names = {file.name for file in digested}
    assert {"hopper.py", "steps.py", "folding.py", "block.py", "tiles.py", "tile.py"} <= names
    assert not names & {"implicit_gemm.py"}
    choose()  # the same key among convolutions
    assert gpu[2:] == ["cudnn", "torch", "triton"]
    kept = cache_file(tmp_path).with_name("em_choice.jsonl").read_text()
    assert json.loads(kept)["finding"] == "one-pass-16"


def test_the_search_can_be_switched_off(gpu, monkeypatch, tmp_path):
    choose(cudnn=Call(), triton=Call())
    choice._cache.cache_clear()
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    kept = cache_file(tmp_path).read_text()
    assert choose() == "cudnn"
    assert choose(key="another convolution") == "cudnn"
    assert cache_file(tmp_path).read_text() == kept
    assert gpu == ["cudnn", "triton"]
    assert choice.known(KEY, CPU) is None


def test_another_value_of_the_variable_switches_nothing_off(gpu, monkeypatch):
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "1")
    assert choose() == "triton"


def test_what_another_process_has_found_is_known_after_rereading(gpu, tmp_path):
    assert choice.known(KEY, CPU) is None
    choose()
    assert choice.known(KEY, CPU) == "triton"
    path = cache_file(tmp_path)
    path.write_text(path.read_text().replace("triton", "cudnn"))  # as another process would
    assert choice.known(KEY, CPU) == "triton"
    choice.reread()
    assert choice.known(KEY, CPU) == "cudnn"


def test_nothing_is_measured_while_a_graph_is_recorded(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    candidates = {"cudnn": Call(), "triton": Call()}
    assert choose(**candidates) == "cudnn"
    assert not gpu
    assert [call.count for call in candidates.values()] == [0, 0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose(**candidates) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(**candidates) == "triton"


WRONG = {
    "fails": (Call(error=RuntimeError("no registers\nptxas says more")), "no registers"),
    "no-engine": (Call(error=NO_ENGINE), str(NO_ENGINE)),
    "differs": (Call(1, 1, 1.1), "its error is 0.1, where 5.96e-08 is allowed"),
    "nan": (Call(1, 1, torch.nan), "its error is nan, where 5.96e-08 is allowed"),
}


@pytest.mark.parametrize("name", ["cudnn", "triton"], ids=["default", "another"])
@pytest.mark.parametrize(("broken", "reason"), WRONG.values(), ids=WRONG)
def test_whoever_is_wrong_is_left_out(gpu, name, broken, reason):
    candidates = {"cudnn": Call(), "torch": Call(), "triton": Call(), name: broken}
    with pytest.warns(UserWarning) as warned:
        winner = choose(**candidates)
    assert [str(w.message) for w in warned] == [f"backend {name} is left out for {KEY}: {reason}"]
    assert gpu == [n for n in candidates if n != name]
    assert winner == gpu[-1]


def test_a_backend_may_be_twice_as_wrong_as_plain_pytorch(gpu):
    check = make_check(Call(1, 1, 1.0625))
    with pytest.warns(UserWarning, match="torch is left out for a convolution: its error is 0.1"):
        winner = choose(check=check, cudnn=Call(1, 0.875, 1), torch=Call(1, 0.874, 1))
    assert winner == "cudnn"


@pytest.mark.parametrize("wrong", [0, 1], ids=["first", "second"])
def test_each_of_several_outputs_is_checked(gpu, wrong):
    outputs = [ONES, 2 * ONES]
    twice = make_check(lambda: 2 * ONES)
    checks = [make_check(), replace(twice, pointwise=lambda rows: 2 * rows)]
    broken = [output + 0.25 * (i == wrong) for i, output in enumerate(outputs)]
    candidates = {"separate": lambda: tuple(outputs), "triton": lambda: tuple(broken)}
    with pytest.warns(UserWarning, match="triton is left out for a convolution: its error is 0.25"):
        assert choose(checks=checks, **candidates) == "separate"
    assert gpu == ["separate"]


class Allocator:
    """Memory that ``torch.full`` fills, and a convolution that reads before it writes."""

    def __init__(self, monkeypatch):
        self.memory = torch.zeros(1, 1, 1, 3)
        monkeypatch.setattr(torch, "full", lambda shape, value, **_: self.memory.fill_(value))

    def reading(self):
        return ONES + 0 * self.memory

    def writing(self):
        return self.memory.copy_(ONES)


def test_memory_is_poisoned_before_each(gpu, monkeypatch):
    """Memory that an earlier candidate wrote does not hide what the next one reads."""
    allocator = Allocator(monkeypatch)
    with pytest.warns(UserWarning, match="its error is nan") as warned:
        winner = choose(cudnn=allocator.reading, torch=allocator.writing, triton=allocator.reading)
    assert winner == "torch"
    assert len(warned) == 2


def test_the_last_resort_where_all_fail(gpu, tmp_path):
    broken = Call(error=RuntimeError("no registers"))
    with pytest.warns(UserWarning, match="left out|left for") as warned:
        assert choose(cudnn=broken, torch=broken, triton=broken) == "torch"
        assert choose() == "torch"  # without another search
    assert str(warned[-1].message) == f"no backend is left for {KEY}; torch is used"
    assert len(warned) == 4
    assert not cache_file(tmp_path).exists()


def test_where_all_fail_a_graph_records_the_last_resort(gpu, monkeypatch):
    broken = Call(error=RuntimeError("no registers"))
    with pytest.warns(UserWarning, match="left out|left for"):
        choose(cudnn=broken, torch=broken)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == "torch"


@pytest.mark.parametrize(("faster", "winner"), [(0.04, "cudnn"), (0.06, "cudnn-benchmark")])
def test_a_search_in_every_process_has_to_pay(gpu, monkeypatch, faster, winner):
    seconds = {"cudnn": 1.0, "cudnn-benchmark": 1 - faster, "triton": 0.99}
    monkeypatch.setattr(choice, "_seconds", lambda name, key, device, run: seconds[name])
    assert choose(**dict.fromkeys(seconds, Call())) == winner


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_decide_nothing(gpu, tmp_path, wrong):
    """One damaged image must not cost the process its backends."""
    assert choose(check=make_check(Call(1.0, wrong, 1.0))) == "cudnn"
    assert gpu == []
    assert not cache_file(tmp_path).exists()
    assert choose() == "triton"


def test_a_layer_that_always_overflows_is_given_up(gpu, tmp_path):
    plain = Call(1.0, torch.inf, 1.0)
    for _ in range(choice.MOST_NOT_FINITE - 1):
        assert choose(check=make_check(plain)) == "cudnn"
    with pytest.warns(UserWarning, match="the outputs are not finite, .*; cudnn is used from now"):
        assert choose(check=make_check(plain)) == "cudnn"
    assert choose(check=make_check(plain)) == "cudnn"
    assert plain.count == choice.MOST_NOT_FINITE
    assert gpu == []
    assert not cache_file(tmp_path).exists()


def test_the_last_resort_where_nothing_can_be_checked(gpu, tmp_path):
    with pytest.warns(UserWarning) as warned:
        assert choose(check=make_check(Call(error=NO_ENGINE))) == "torch"
    assert [str(w.message) for w in warned] == [
        f"{KEY} cannot be checked: {NO_ENGINE}",
        f"no backend is left for {KEY}; torch is used",
    ]
    assert not cache_file(tmp_path).exists()


@pytest.mark.parametrize("name", ["cudnn", "triton"], ids=["default", "another"])
@pytest.mark.parametrize(
    "error", [OUT_OF_MEMORY, RuntimeError("CUDA error: out of memory")], ids=["pytorch", "cuda"]
)
def test_without_memory_the_default_is_taken_and_nothing_kept(gpu, tmp_path, name, error):
    candidates = {"cudnn": Call(), "triton": Call(), name: Call(error=error)}
    with pytest.warns(UserWarning, match="no memory to measure a convolution; cudnn is used"):
        assert choose(**candidates) == "cudnn"
    assert not cache_file(tmp_path).exists()
    assert choose() == "triton"


def test_without_an_engine_for_lack_of_memory_nothing_is_kept(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(choice.MemoryWatch, "_is_short", lambda watch: True)
    with pytest.warns(UserWarning, match="no memory to measure a convolution; cudnn is used"):
        assert choose(cudnn=Call(), torch=Call(error=NO_ENGINE)) == "cudnn"
    assert not cache_file(tmp_path).exists()


def test_a_backend_that_is_gone_is_not_taken_from_the_cache(gpu):
    choose(cudnn=Call(), gone=Call())
    assert choose() == "triton"


def launching(cuda, name, seconds, host_seconds):
    def run():
        cuda.launch(name, seconds, host_seconds)
        return ONES

    return run


def test_the_clock_is_that_of_replays(cuda):
    """Python's 73 microseconds do not count: a replay of the network does not have them."""
    triton = launching(cuda, "triton", 11e-6, 73e-6)
    cudnn = launching(cuda, "cudnn", 20e-6, 5e-6)
    candidates = {"cudnn": cudnn, "torch": cudnn, "triton": triton}
    assert choice.fastest(KEY, GPU, candidates, lambda: [make_check()]) == "triton"
    assert choice._seconds("triton", KEY, GPU, triton) == pytest.approx(11e-6)


def test_what_cannot_be_recorded_is_timed_by_launches(cuda):
    cuda.invalid = True
    triton = launching(cuda, "triton", 11e-6, 73e-6)
    message = (
        f"backend triton is timed launch by launch for {KEY}, as it cannot be recorded: "
        "CUDA error: operation failed due to a previous error"
    )
    with pytest.warns(UserWarning) as warned:
        assert choice._seconds("triton", KEY, GPU, triton) == pytest.approx(73e-6, rel=0.1)
    assert [str(w.message) for w in warned] == [message]
    assert cuda.streams == cuda.default_streams


def test_without_memory_to_record_nothing_is_timed(cuda, monkeypatch):
    def fail(run, device):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(choice, "record", fail)
    with pytest.raises(torch.OutOfMemoryError):
        choice._seconds("triton", KEY, GPU, Call())
