"""Recording and timing of CUDA graphs: with a stand-in for a GPU, and on a GPU if there is one."""

import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emanet_triton.kernels import replay
from emanet_triton.kernels.device import is_capturing
from emanet_triton.kernels.replay import Replay, record, seconds_on_device

MICRO = 1e-6
FIRST, SECOND = (torch.device("cuda", index) for index in range(2))


class Weights:
    """Data that a launch reads."""


def test_what_a_graph_reads_stays_as_long_as_the_graph(cuda):
    weights = Weights()
    alive = weakref.ref(weights)

    def launch(weights=weights):
        return cuda.launch(type(weights).__name__, MICRO)

    run = Replay(launch)
    del weights, launch
    gc.collect()
    assert alive() is not None
    del run
    gc.collect()
    assert alive() is None


@pytest.fixture
def convolution(cuda):
    """A kernel of 11 microseconds that Python takes 73 to launch."""
    return lambda: cuda.launch("conv", 11 * MICRO, host_seconds=73 * MICRO)


def test_a_replay_launches_what_was_recorded_and_gives_the_result(cuda, convolution):
    run = Replay(convolution)
    assert cuda.log == ["conv"]  # the warm-up; recording launches nothing
    assert cuda.error_mode == "thread_local"
    host = cuda.host
    assert [run(), run()] == ["conv", "conv"]
    assert cuda.log == ["conv"] * 3
    assert cuda.host - host == pytest.approx(10 * MICRO)
    assert cuda.streams == cuda.default_streams


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_the_time_is_that_of_the_device_alone(cuda, convolution, cold, monkeypatch):
    monkeypatch.setattr(replay, "_flush", lambda: lambda: cuda.launch("flush", 95 * MICRO))
    times = seconds_on_device(Replay(convolution), rounds=3, cold=cold)
    assert times == pytest.approx([11 * MICRO] * 3)
    assert ("flush" in cuda.log) == cold


def test_the_cache_is_flushed_before_every_cold_replay(cuda, convolution, monkeypatch):
    monkeypatch.setattr(replay, "_flush", lambda: lambda: cuda.launch("flush", 95 * MICRO))
    seconds_on_device(Replay(convolution), rounds=2, cold=True)
    assert cuda.log == ["conv", "flush", "conv", "flush", "conv"]


def test_a_warm_time_is_the_mean_of_about_a_millisecond(cuda, convolution):
    run = Replay(convolution)
    cuda.log.clear()
    seconds_on_device(run, rounds=1, cold=False)
    assert len(cuda.log) == 2 + 1 + 91  # to see how many there should be, untimed, and timed


def test_launches_count_where_nothing_is_recorded(cuda, convolution):
    times = seconds_on_device(convolution, rounds=2, cold=False)
    assert times == pytest.approx([73 * MICRO] * 2, rel=0.2)


def test_everything_is_put_back_where_recording_fails(cuda, convolution):
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="operation failed due to a previous error"):
        record(convolution, FIRST)
    assert cuda.streams == cuda.default_streams
    assert cuda.pools == []


def test_everything_is_put_back_where_the_call_fails(cuda):
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, FIRST)
    assert cuda.streams == cuda.default_streams
    assert cuda.pools == []


@pytest.mark.parametrize("invalid", [False, True], ids=["whole", "failed"])
def test_a_recording_on_another_device_leaves_the_current_one(cuda, invalid):
    """PyTorch would record on the device of the first recording, and thus nothing."""
    for device in (FIRST, SECOND):
        graph, _ = record(lambda: cuda.launch("conv", MICRO, device=device.index), device)  # noqa: B023
        assert graph.launches == [("conv", MICRO)]
    cuda.invalid = invalid
    with pytest.raises(RuntimeError) if invalid else contextlib.nullcontext():
        record(lambda: None, SECOND)
    assert cuda.log == []
    assert cuda.current == 0
    assert cuda.streams == cuda.default_streams
    assert cuda.pools == []


def test_a_recording_is_found_on_the_device_of_the_tensors(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: cuda.current == 1)
    assert is_capturing(SECOND)
    assert not is_capturing(FIRST)
    assert not is_capturing(torch.device("cpu"))


def test_two_threads_record_one_after_the_other(cuda):
    inside = threading.Semaphore()

    def launch():
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        inside.release()

    with ThreadPoolExecutor(4) as pool:
        for recorded in [pool.submit(record, launch, FIRST) for _ in range(8)]:
            recorded.result()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_on_a_gpu(cold):
    x = torch.ones(2**20, device="cuda")
    double = Replay(lambda: x * 2)
    x.fill_(3)
    assert double().eq(6).all()
    assert all(0 < seconds < 1e-2 for seconds in seconds_on_device(double, rounds=5, cold=cold))
