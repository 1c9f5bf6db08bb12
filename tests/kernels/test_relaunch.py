"""Compiled kernels start again without Triton, where nobody watches and Triton is known."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import relaunches
import torch
import triton
from triton.experimental import gluon
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from emanet_triton.bench.ahead_of_time import gates
from emanet_triton.kernels import relaunch

SCRIPT = Path(__file__).parents[1] / "relaunches.py"


@pytest.fixture
def device(monkeypatch):
    """A driver whose current device is 3."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 3))
    runtime = SimpleNamespace(driver=driver)
    monkeypatch.setattr(relaunch, "triton", SimpleNamespace(runtime=runtime))
    return driver.active


def test_the_device_and_knobs_are_settings(device, monkeypatch):
    compilation = SimpleNamespace(instrumentation_mode="")
    found = []

    def note():
        runtime = SimpleNamespace(debug=debug)
        knobs = SimpleNamespace(runtime=runtime, compilation=compilation)
        monkeypatch.setattr(relaunch, "knobs", knobs)
        found.append(relaunch.settings())

    debug = False
    note()
    debug = True
    note()
    compilation.instrumentation_mode = "a mode"
    note()
    compilation.fpsan_homomorphic_casts = True  # of newer versions
    note()
    device.get_current_device = lambda: 4
    note()
    assert len(set(found)) == 5


def kernel(x, n, BLOCK): ...


def compiled_kernel():
    """A kernel as Triton keeps it for a GPU, which the interpreter would not make."""
    return JITFunction(kernel)


def test_hooks_and_other_kernels_are_not_usual(monkeypatch):
    kernel = compiled_kernel()
    assert relaunch._is_usual(kernel)
    assert not relaunch._is_usual(type("Other", (JITFunction,), {})(kernel.fn))
    assert relaunch._is_usual(gluon.jit(kernel.fn))
    assert not relaunch._is_usual(InterpretedFunction(kernel.fn))
    kernel.pre_run_hooks.append(print)
    assert not relaunch._is_usual(kernel)
    kernel.pre_run_hooks.clear()
    runtime = triton.knobs.runtime
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
        assert not relaunch._is_usual(kernel)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "launch_enter_hook", lambda *_: None)
        assert not relaunch._is_usual(kernel)
    assert relaunch._is_usual(kernel)


def test_how_a_kernel_starts_again(monkeypatch):
    class Compiled:
        function, packed_metadata, run = "function", "packed", "run"

    monkeypatch.setattr(relaunch, "CompiledKernel", Compiled)
    found, compiled, constants = compiled_kernel(), Compiled(), {"num_warps": 4, "BLOCK": 64}
    ready = relaunch.ready(found, compiled, 2, constants)
    assert ready == (compiled, "run", ("function", "packed", None, None, None), (64,))
    in_the_background = SimpleNamespace(run=None)
    assert relaunch.ready(found, in_the_background, 2, constants) is None
    assert relaunch.ready(found, compiled, 2, {"num_warps": 4}) is None  # BLOCK has a default
    assert relaunch.ready(InterpretedFunction(kernel), compiled, 2, constants) is None


def test_launches_are_told_of(monkeypatch):
    monkeypatch.setattr(relaunch, "ready", lambda *arguments: arguments)
    launched, told = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **keywords: launched.append((grid, arguments, keywords))

    found = Kernel()
    relaunch.start(found, (2,), (1, 2), {"BLOCK": 3})
    with relaunch.noting(lambda *what: told.append(what)):
        relaunch.start(found, (4, 5), (1,), {})
    relaunch.start(found, (2,), (), {})
    assert launched == [((2,), (1, 2), {"BLOCK": 3}), ((4, 5), (1,), {}), ((2,), (), {})]
    assert told == [(found, (found, None, 1, {}), (4, 5), (1,))]


def test_only_gpus_of_nvidia_have_the_fast_way(monkeypatch):
    devices = [torch.device(name) for name in ("cuda:1", "cpu", "meta")]
    monkeypatch.setattr(relaunch, "_IS_READ", True)
    assert [relaunch.has_fast_way(device) for device in devices] == [True, False, False]
    monkeypatch.setattr(relaunch, "_IS_READ", False)
    assert not any(map(relaunch.has_fast_way, devices))


def test_versions_that_were_read_are_those_that_the_gates_have_seen():
    assert [version.rstrip(".") for version in relaunch.READ_VERSIONS] == list(gates.SEEN)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """What ``relaunches.py`` says, where Triton is of a version that was read."""
    if not relaunch._IS_READ:
        pytest.skip("this Triton has no fast way")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_triton_searches_until_there_is_a_tape(scenes):
    assert scenes["repeated"] == {
        "searches": [1, 1, 0], "same": [True] * 3, "streams": [0, 0, 5], "arguments": True,
    }  # fmt: skip


def test_a_launch_of_other_traits_gets_triton_s_kernel(scenes):
    assert len(scenes["varied"]) == 11
    for name, scene in scenes["varied"].items():
        assert scene["searches"] == [1, 1, 0], name
        *own, triton_s = scene["kernels"]
        assert own == [triton_s] * 3, name
        assert triton_s != scene["usual"], name


def test_each_device_has_its_own_kernel(scenes):
    assert scenes["on_another_device"]["searches"] == [1, 1, 0]
    before, *there = scenes["on_another_device"]["kernels"]
    assert there == there[:1] * 3 != [before] * 3


def test_whoever_watches_sees_every_launch(scenes):
    scene = scenes["watched"]
    assert scene["seen"] == [
        "launch_enter_hook scale", "launch_exit_hook scale", "pre_run_hook", "run scale",
    ]  # fmt: skip
    assert set(scene["searches"].values()) == {1}
    assert scene["afterwards"] == 0


def test_what_is_unknown_takes_triton_s_way(scenes):
    assert scenes["unknown"] == [1, 1, 1, 1]


def test_a_kernel_that_does_not_fit_is_refused_each_time(scenes):
    first, second = scenes["without_memory"]
    assert first == second
    assert "out of resource" in first


def test_threads_get_the_kernels_of_their_arguments(scenes):
    assert scenes["from_threads"] is True


LAUNCHES = {
    "operator conv_bias_act": 1, "operator em_attention_block": 15,
    "conv_bias_act": 1, "conv_bias_act_of_copies": 1, "conv_bias_act_in_gluon": 1,
    "expand_reduce": 1, "max_pool": 1, "labels": 1, "probabilities": 1, "counts": 1, "pixels": 1,
    "em_attention": 10, "em_attention_in_one_pass": 5, "em_attention_block": 15,
    "em_attention_block_in_one_pass": 12,
}  # fmt: skip


def test_all_operators_are_launched(scenes):
    assert scenes["operators"].keys() == LAUNCHES.keys()


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_tape_launches_the_same(scenes, name):
    """Kernels, grids and arguments, with the tensors in the same places; and the outputs."""
    scene = scenes["operators"][name]
    launches = len(scene["kernels"])
    assert launches == LAUNCHES[name]
    assert scene["searches"] == [launches, launches, 0, 0]
    assert scene["same"]
    assert scene["same_outputs"]


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("em_")])
def test_many_launches_take_less_time(scenes, name):
    times = scenes["operators"][name]["microseconds"]
    assert times["tape_us"] < times["triton_us"]


def test_times_become_rows(tmp_path, monkeypatch):
    times = {"triton_us": 3.0, "tape_us": 1.5}
    found = {"kernels": ["a", "b"], "microseconds": times}
    monkeypatch.setattr(relaunches, "operators", lambda: {"operator": found})
    monkeypatch.setattr(relaunches, "network", lambda: {**found, "kernels": ["a"]})
    relaunches.write_times(tmp_path / "times.csv")
    with (tmp_path / "times.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = Path(__file__).parents[2] / "benchmarks/results/zen4/launches.csv"
    assert [*rows[0]] == kept.read_text().splitlines()[0].split(",")
    names = "operator", "launches", "triton_us", "tape_us"
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("operator", "2", "3.0", "1.5"), ("fused R50", "1", "3.0", "1.5"),
    ]  # fmt: skip
    assert {row["torch"] for row in rows} == {torch.__version__}
