"""How a call is timed, with a stand-in for the GPU, and what a replay must write."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch

from emanet_triton.bench import clocks, measure
from emanet_triton.bench.case import Case
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.method import Method
from emanet_triton.kernels import replay

MICRO = 1e-6
MACHINE = Machine(*("A GPU", None, "570", "2.11", "3.6", "abc", "2026-11-23"), 3e3, {"fp32": 1}, 0)


@pytest.fixture
def device(cuda, monkeypatch):
    """A stand-in whose L2 cache is flushed in 95 microseconds, and that is always healthy."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(replay, "_flush", lambda: lambda: cuda.launch("flush", 95 * MICRO))
    return cuda


@pytest.fixture
def convolution(device):
    """A kernel of 11 microseconds that Python takes 110 to launch."""
    return lambda: device.launch("conv", 11 * MICRO, host_seconds=110 * MICRO)


def test_python_does_not_count_where_a_graph_is_replayed(convolution):
    timer = clocks.graph_timer(convolution)
    assert timer.clock == "graph"
    assert timer() == pytest.approx((11 * MICRO, 11 * MICRO))


def test_launches_are_timed_with_a_warm_and_a_cold_cache(convolution, device):
    timer = clocks.events_timer(convolution)
    assert timer.clock == "events"
    warm, cold = timer()
    assert warm == pytest.approx(110 * MICRO, rel=0.2)  # the host is the slower
    assert cold == pytest.approx(26 * MICRO)  # the flush hides 95 of the 110
    assert "flush" in device.log


def test_a_call_that_cannot_be_captured_is_timed_by_events(convolution, device):
    device.invalid = True
    timer = clocks.graph_timer(convolution)
    assert (timer.clock, timer.run) == ("events", convolution)


def test_a_capture_that_costs_the_context_is_an_error(convolution, device, monkeypatch):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device.invalid = True
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        clocks.graph_timer(convolution)


def test_the_rest_before_a_call_with_other_threads_does_not_count(monkeypatch):
    monkeypatch.setattr(clocks, "SPIN_SECONDS", 0.05)
    begin = time.perf_counter()
    seconds = clocks.wall_timer(lambda: None, own_threads=True)().warm
    assert seconds < 0.05 <= time.perf_counter() - begin


def test_wall_clock():
    timer = clocks.wall_timer(lambda: time.sleep(0.02))
    assert timer.clock == "wall"
    assert timer().warm >= 0.02
    assert timer().cold is None


def test_wall_clock_of_a_gpu_waits_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert clocks.synchronised_timer(lambda: order.append("call"))().warm > 0
    assert order == ["wait", "call", "wait"]


def test_the_hosts_time_is_that_until_a_call_returns(monkeypatch):
    order, seconds = [], iter([0.0, 9.0, 10.0, 12.0, 20.0, 23.0, 30.0, 31.0, 40.0, 44.0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert clocks.host_seconds(lambda: order.append("call")) == 3.0  # of 9, 2, 3, 1, 4
    assert order == ["wait", "call"] * 5 + ["wait"]


def test_poison():
    with torch.inference_mode():
        labels = torch.zeros(3, dtype=torch.uint8)
    floats, long = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    clocks.poison(([floats, labels], long, "text"), "cpu")
    assert floats.isnan().all()
    assert labels.tolist() == [255] * 3
    assert (long == 2**63 - 1).all()
    clocks.poison(other := torch.zeros(2), "cuda")
    assert other.tolist() == [0, 0]


class Device:
    """Graphs that hold a call. The test decides what their replay writes."""

    def __init__(self, monkeypatch, writes=True, captures=True):
        self.writes, self.captures, self.replays = writes, captures, 0
        monkeypatch.setattr(clocks, "Replay", self.record)
        monkeypatch.setattr(clocks, "seconds_on_device", self.seconds)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(measure, "poison", lambda result, _: clocks.poison(result, "cpu"))

    def record(self, call):
        if not self.captures:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        held = call()

        def replay():
            self.replays += 1
            return held.copy_(call()) if self.writes else held

        return replay

    def seconds(self, run, *, rounds, cold):
        run()
        return [2e-3 if cold else 1e-3]


def row_of(call, **changes):
    case = Case(
        *("em", "block", {"triton": lambda: call}, "triton"),
        error=lambda got: (got - 1).abs().max().item(),
        bound=0.1,
        graph=True,
    )
    method = Method("cuda", rounds=3)
    return measure.measure(dataclasses.replace(case, **changes), method, MACHINE)[0]


def test_a_row_of_a_gpu_has_warm_and_cold_times_and_its_clock(monkeypatch):
    device = Device(monkeypatch)
    row = row_of(lambda: torch.ones(3))
    assert (row.gate, row.clock, row.p50_ms, row.cold_ms) == ("passed", "graph", 1.0, 2.0)
    assert 0 < row.host_us < 1e5
    assert device.replays > 2


def test_a_replay_that_writes_nothing_fails(monkeypatch):
    Device(monkeypatch, writes=False)
    row = row_of(lambda: torch.ones(3))
    assert row.gate == "failed: error nan above 1.0e-01"
    assert row.p50_ms is row.cold_ms is row.host_us is None


def test_launches_are_checked_on_overwritten_memory_where_no_graph_is(monkeypatch):
    Device(monkeypatch, captures=False)
    result = torch.ones(3)
    assert row_of(lambda: result).gate == "failed: error nan above 1.0e-01"
    row = row_of(lambda: result.fill_(1.0))
    assert (row.gate, row.clock) == ("passed", "events")


def test_other_cases_are_neither_captured_nor_called_again_for_the_gate(monkeypatch):
    device = Device(monkeypatch)
    result = torch.ones(3)
    row = row_of(lambda: result, graph=False)
    assert (row.gate, row.clock, device.replays) == ("passed", "events", 0)
    row = row_of(lambda: result, graph=False, wall=True)
    assert (row.gate, row.clock, row.host_us, row.cold_ms) == ("passed", "wall", None, None)
