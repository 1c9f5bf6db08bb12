"""A kernel that ran is found again without Triton, and never for arguments that it is not for."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.experimental import gluon
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from emanet_triton.bench.ahead_of_time import gates
from emanet_triton.kernels import relaunch
from emanet_triton.kernels.em import hopper

SCRIPT = Path(__file__).parents[1] / "relaunches.py"
X = torch.zeros(8, 32)
HALF = torch.zeros(8, 32, dtype=torch.float16)


def describe(tensor=HALF, block=(4, 16), padding="zero"):
    return TensorDescriptor.from_tensor(tensor, list(block), padding)


# Of two arguments of a row Triton may make different kernels.
DIFFERENT = {
    "type": (None, 0, 0.0, False, X),
    "1": (1, 1.0, True, 2),
    "size": (1, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 16, 2**63, -1),
    "dtype": (X, X.half(), X.to(torch.bfloat16), X.to(torch.int32)),
    "alignment": (X, X.view(-1)[1:]),
    "types of numbers": (3, 3.0, None, False),
    "descriptor": (
        describe(), describe(block=(8, 16)), describe(HALF[:4]), describe(padding="nan"),
        describe(HALF.to(torch.bfloat16)), describe(torch.zeros(8, 64, dtype=torch.float16)),
        hopper.rows_of(HALF[None], 4), hopper.rows_of(HALF[None], 8),
        replace(hopper.rows_of(HALF[None], 8), layout=hopper.rows_of(HALF[None, :, :16], 8).layout),
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments", DIFFERENT.values(), ids=DIFFERENT)
def test_what_triton_tells_apart_has_another_key(arguments):
    keys = [relaunch._key(0, [argument])[0] for argument in arguments]
    assert len(set(keys)) == len(keys)


def test_the_same_launch_has_the_same_key():
    arguments = [X, None, describe(), 3, 0.5, X.view(-1)[4:]]
    nan = float("nan")  # Triton makes no kernels for single values of floats
    others = [torch.nn.Parameter(X + 1), None, describe(HALF + 1), 3, nan, X.view(-1)[8:]]
    assert relaunch._key(0, arguments)[0] == relaunch._key(0, others)[0]


def test_order_and_device_are_in_the_key():
    keys = [relaunch._key(device, order)[0] for device in (0, 1) for order in ([1, X], [X, 1])]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("knobs", "name", "value"),
    [("runtime", "debug", True), ("compilation", "instrumentation_mode", "a mode")],
    ids=["debug", "instrumentation"],
)
def test_settings_of_triton_are_in_the_key(knobs, name, value, monkeypatch):
    before = relaunch._key(0, [X])
    monkeypatch.setattr(getattr(triton.knobs, knobs), name, value)
    assert relaunch._key(0, [X]) != before


def test_pointers_start_a_kernel():
    assert relaunch._key(0, [X, None, 3])[1] == [X.data_ptr(), None, 3]


def test_descriptors_that_round_have_another_key():
    rounding = describe()
    rounding.round_f32_to_tf32 = True  # later, because Triton 3.6 knows no such argument
    assert relaunch._key(0, [rounding])[0] != relaunch._key(0, [describe()])[0]


def test_settings_of_newer_versions_are_in_the_key(monkeypatch):
    before = relaunch._key(0, [X])
    compilation = SimpleNamespace(instrumentation_mode="", fpsan_homomorphic_casts=True)
    monkeypatch.setattr(relaunch, "knobs", SimpleNamespace(
        runtime=triton.knobs.runtime, compilation=compilation,
    ))  # fmt: skip
    assert relaunch._key(0, [X]) != before


def compiled_kernel():
    """A kernel as Triton keeps it for a GPU, which the interpreter would not make."""
    return JITFunction(test_settings_of_newer_versions_are_in_the_key)


def test_hooks_and_other_kernels_are_not_usual(monkeypatch):
    kernel = compiled_kernel()
    assert relaunch._is_usual(kernel)
    assert not relaunch._is_usual(type("Other", (JITFunction,), {})(kernel.fn))
    assert relaunch._is_usual(gluon.jit(kernel.fn))
    assert not relaunch._is_usual(InterpretedFunction(kernel.fn))
    runtime = triton.knobs.runtime
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
        assert not relaunch._is_usual(kernel)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "launch_enter_hook", lambda *_: None)
        assert not relaunch._is_usual(kernel)
    assert relaunch._is_usual(kernel)


def test_a_kernel_is_kept_only_if_it_can_be_started_again(monkeypatch):
    def kernel(x, n, BLOCK): ...

    class Compiled:
        function = packed_metadata = run = None

    monkeypatch.setattr(relaunch, "CompiledKernel", Compiled)
    found = SimpleNamespace(fn=kernel)
    launcher = relaunch.Launcher(found, {"BLOCK": 1})
    launcher._keep("key", SimpleNamespace(run=None), 2)  # compiled in the background, say
    assert launcher._ready == {}
    launcher._keep("key", Compiled(), 2)
    assert list(launcher._ready) == ["key"]
    without_block = relaunch.Launcher(found, {})
    without_block._keep("key", Compiled(), 2)
    assert without_block._ready == {}


@pytest.mark.parametrize("argument", ["text", (1, 2), object()], ids=["str", "tuple", "object"])
def test_other_arguments_have_no_key(argument):
    assert relaunch._key(0, [X, argument])[0] is None


def test_launchers_are_shared_by_equal_constants_only():
    def kernel(): ...

    constants = [{"C": 1}, {"C": 2}, {"K": 1}, {"C": 1, "K": 2}, {"K": 2, "C": 2}]
    found = [relaunch.launcher(kernel, c) for c in constants]
    assert found == [relaunch.launcher(kernel, dict(c)) for c in constants]
    assert all(a is not b for a, b in itertools.combinations(found, 2))
    assert relaunch.launcher(lambda: None, constants[0]) is not found[0]


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


def test_triton_searches_for_a_kernel_once(scenes):
    assert scenes["repeated"] == {
        "searches": 0, "same": [True] * 3, "streams": [0, 5], "arguments": True,
    }  # fmt: skip


def test_a_launch_of_other_traits_gets_triton_s_kernel(scenes):
    assert len(scenes["varied"]) == 11
    for name, scene in scenes["varied"].items():
        assert scene["searches"] == [1, 0], name
        first, second, triton_s = scene["kernels"]
        assert first == second == triton_s != scene["usual"], name


def test_each_device_has_its_own_kernel(scenes):
    assert scenes["on_another_device"]["searches"] == [1, 0]
    before, first, second = scenes["on_another_device"]["kernels"]
    assert before != first == second


def test_whoever_watches_sees_every_launch(scenes):
    scene = scenes["watched"]
    assert scene["seen"] == [
        "launch_enter_hook scale", "launch_exit_hook scale", "pre_run_hook", "run scale",
    ]  # fmt: skip
    assert set(scene["searches"].values()) == {1}
    assert scene["afterwards"] == 0


def test_what_is_unknown_takes_triton_s_way(scenes):
    assert scenes["unknown"] == {"type": [1, 1], "version": [1, 1]}


def test_a_kernel_that_does_not_fit_is_refused_each_time(scenes):
    first, second = scenes["without_memory"]
    assert first == second
    assert "out of resource" in first


def test_threads_get_the_kernels_of_their_arguments(scenes):
    assert scenes["from_threads"] is True


LAUNCHES = {
    "conv_bias_act": 1, "conv_bias_act_in_gluon": 1, "expand_reduce": 1,
    "em_attention": 10, "em_attention_in_one_pass": 5, "em_attention_block": 15,
    "em_attention_block_in_one_pass": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_operators_search_for_no_kernel_again(scenes, name):
    scene = scenes["operators"][name]
    assert scene["same"]
    usual, _, again = scene["searches"]
    assert usual == len(scene["kernels"]) == LAUNCHES[name]
    assert again == 0


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name.startswith("em_")])
def test_many_launches_take_less_time(scenes, name):
    times = scenes["operators"][name]["microseconds"]
    assert times["again"] < times["triton"]
