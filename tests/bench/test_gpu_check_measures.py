"""What the steps do on a GPU, here on the CPU: kernels interpreted, a device that is fake."""

import json
from dataclasses import replace

import pytest
import torch
import triton

from emanet_triton.bench.gpu_check import correct, host, meta, own, single, sweep, trace
from emanet_triton.bench.gpu_check.conv_cases import ConvCase, with_dtype
from emanet_triton.bench.gpu_check.families import FAMILIES, small_calls
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.kernels import launch
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.launch import TileReplaced

SM_90 = Gpu.of_arch("sm_90")
MACHINE = Machine(
    *("A GPU", None, "570", "2.11", "3.6", "abc", "2026-11-23"), 3e3, {"bf16": 800}, 0
)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """The steps measure on the CPU."""
    monkeypatch.setattr(own, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


class Dead(Watch):
    """After an error nothing runs."""

    def is_lost(self, error):
        return True


@pytest.fixture
def candidate(monkeypatch):
    """A float16 convolution with another tile; its replays take 2 ms warm and 3 ms cold."""
    monkeypatch.setattr(sweep, "Replay", lambda call: call)
    monkeypatch.setattr(
        sweep, "seconds_on_device", lambda run, rounds, cold: [0.003 if cold else 0.002] * rounds
    )
    monkeypatch.setattr(sweep, "_resources", lambda launch, gpu: (128, 0, 65_536))
    call = with_dtype(small_calls()[0], torch.float16)
    tile = conv_tiles.tile("conv_rows", "sm_90", "fp16", 64, 64, 1024)
    smaller = replace(tile, meta={**tile.meta, "BLOCK_O": 32}, pipeline_stages=2)
    sweep._problem.cache_clear()
    return sweep.Candidate(Launch(call, smaller), 3, False)


def test_a_tile_is_timed_and_held_against_the_floor(candidate):
    row = sweep.time_tile(candidate, SM_90, Watch())
    assert (row.gate, row.ms, row.cold_ms) == ("passed", 2.0, 3.0)
    assert (row.tile, row.shipped, row.uses) == ("128x32x64 warps=4 stages=2", False, 3)
    assert (row.registers, row.stack, row.shared) == (128, 0, 65_536)
    sweep._hold_against_floor(row, candidate.launch.call, MACHINE)
    flops = 2 * 8 * 128 * 64 * 64 * 9
    assert row.tflop_s == pytest.approx(flops / 0.002 / 1e12)
    assert 0 < row.floor_share < 1e-3


def test_the_tile_that_is_launched_is_the_candidate_s(candidate, monkeypatch):
    launched = []
    launch = conv_triton.launch
    monkeypatch.setattr(
        conv_triton,
        "launch",
        lambda k, tile, *a, **c: (launched.append(tile), launch(k, tile, *a, **c)),
    )
    sweep.time_tile(candidate, SM_90, Watch())
    assert launched[0].meta["BLOCK_O"] == 64  # what it is held against
    assert {tile.meta["BLOCK_O"] for tile in launched[1:]} == {32}


def test_a_tile_with_another_result_gets_no_time(candidate, monkeypatch):
    inputs, want = sweep._problem(candidate.launch.call)
    monkeypatch.setattr(sweep, "_problem", lambda call: (inputs, want + 1))
    row = sweep.time_tile(candidate, SM_90, Watch())
    assert row.gate == "failed: 1 off the shipped tile's result"
    assert row.ms is None


def test_a_tile_that_does_not_fit_is_absent(candidate, monkeypatch):
    def refuse(*arguments, **options):
        raise TileReplaced from ValueError("it needs 300000 of shared memory")

    sweep._problem(candidate.launch.call)
    monkeypatch.setattr(conv_triton, "launch", refuse)
    row = sweep.time_tile(candidate, SM_90, Watch())
    assert row.gate == "absent: it does not fit: it needs 300000 of shared memory"


def test_a_tile_that_was_refused_once_is_tried_again(candidate, monkeypatch):
    """Another shape may take it; a smaller tile must not run under its name."""
    asked = []

    class Kernel:
        def __getitem__(self, programs):
            return self.refuse

        def refuse(self, *arguments, num_stages, **options):
            asked.append(num_stages)
            raise triton.OutOfResources(300_000, 200_000, "shared memory")

    sweep._problem(candidate.launch.call)
    monkeypatch.setattr(launch, "_REPLACEMENTS", {})
    for kernel in ("conv_rows", "conv_pointers"):
        monkeypatch.setattr(conv_triton, kernel, Kernel())
    with pytest.warns(UserWarning, match="does not fit"):
        gates = [sweep.time_tile(candidate, SM_90, Watch()).gate for _ in range(2)]
    assert all(gate.startswith("absent: it does not fit: out of resource") for gate in gates)
    assert asked == [candidate.launch.tile.pipeline_stages] * 2


@pytest.mark.parametrize("dead", [False, True], ids=["goes on", "dead"])
def test_an_error_of_a_tile(candidate, monkeypatch, dead):
    def fail(*arguments, **options):
        raise RuntimeError("an illegal memory access\nand more")

    sweep._problem(candidate.launch.call)
    monkeypatch.setattr(conv_triton, "launch", fail)
    if dead:
        with pytest.raises(Lost, match="an illegal memory access"):
            sweep.time_tile(candidate, SM_90, Dead())
        return
    row = sweep.time_tile(candidate, SM_90, Watch())
    assert row.gate == "failed: RuntimeError: an illegal memory access"


def test_a_sweep_goes_on_behind_a_lost_tile(candidate, monkeypatch):
    def lanes(lanes, processes, silence, done):
        (jobs,) = lanes
        for job in jobs:
            if job.func is sweep.measure_ceilings:
                done(job, MACHINE)
            elif job.args[0].shipped:
                done(job, Lost("", "its process ended by SIGSEGV"))
            else:
                done(job, job(Watch()))

    monkeypatch.setattr(sweep, "run_lanes", lanes)
    rows = []
    sweep._run([replace(candidate, shipped=True), candidate], SM_90, rows.append)
    assert [row.gate for row in rows] == ["failed: its process ended by SIGSEGV", "passed"]
    assert rows[1].floor_share


def test_the_host_s_time_of_a_call(monkeypatch):
    monkeypatch.setattr(host, "host_seconds", lambda call: 75e-6)
    case = ConvCase(with_dtype(small_calls()[1], torch.float16))
    row = host.time_case(case, Watch())
    assert (row.case, row.gate, row.host_us) == (case.name, "passed", pytest.approx(75))
    assert row.first_ms > 0


@pytest.mark.parametrize("dead", [False, True], ids=["goes on", "dead"])
def test_an_error_of_the_host_s_calls(dead):
    case = ConvCase(small_calls()[0].but(backend="cudnn"))  # there is none on a CPU
    if dead:
        with pytest.raises(Lost, match="backend 'cudnn' needs an NVIDIA GPU"):
            host.time_case(case, Dead())
        return
    gate = host.time_case(case, Watch()).gate
    assert gate == (
        "failed: ValueError: backend 'cudnn' needs an NVIDIA GPU and cuDNN; x is on cpu"
    )


def test_a_profiler_s_range_is_around_the_second_run(monkeypatch):
    done = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: done.append(name))

    class Case:
        name = "a case"

        def runner(self, device):
            return lambda: done.append(device)

    single._run(Case(), profiled=True)
    single._run(Case(), profiled=False)
    assert done == ["cpu", "start", "cpu", "stop", "cpu"]


def test_a_network_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "Replay", lambda call: call)
    monkeypatch.setattr(trace, "TINY_SIZE", (24, 40))
    trace._trace("r50", "whole", True, tmp_path / "r50_whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("r50_whole_eager.csv", "r50_whole_eager.json"),
        *("r50_whole_replay.csv", "r50_whole_replay.json"),
    ]
    content = json.loads((tmp_path / "r50_whole_eager.json").read_text())
    assert any(event["name"] == "aten::convolution" for event in content["traceEvents"])


def test_families_of_another_vendor():
    assert FAMILIES["cudnn"](Gpu.of_arch("gfx942"), True) == []
    assert FAMILIES["cudnn"](SM_90, True)


def test_the_family_of_cudnn_has_both_of_its_operators():
    residuals = {case.call["residual"] is not None for case in FAMILIES["cudnn"](SM_90, False)}
    assert residuals == {False, True}
    assert all(case.call["relu"] for case in FAMILIES["cudnn"](SM_90, False))


def test_a_gpu_is_named_as_triton_names_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(meta, "gpu_arch", lambda device: "sm_80")
    gpu = Gpu.here()
    assert (gpu.arch, gpu.target.backend, gpu.target.arch) == ("sm_80", "cuda", 89)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(meta, "gpu_arch", lambda device: "gfx942")
    assert Gpu.here() == Gpu.of_arch("gfx942")


def test_cases_run_where_the_steps_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(correct.Gpu, "here", lambda: SM_90)
    seen = []
    monkeypatch.setattr(correct, "run_families", lambda cases, device, found: seen.append(device))
    assert correct.main(["confusion", "--tiny", "--out", str(tmp_path)]) == 0
    assert seen == ["cpu"]
