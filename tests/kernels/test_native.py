"""The kernels' tests as they would run on a GPU, without one: what they launch, and where."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.interpreter import InterpretedFunction

from emanet_triton.bench.gpu_check.plan import ON_A_CPU

TESTS = Path(__file__).parents[1]
KERNELS = TESTS / "kernels"
ROOT = TESTS.parent
BACKENDS = "tests/models/test_head_backends.py"
FULL_SIZE = f"--deselect={BACKENDS}::test_golden_logits"  # whose networks are slow to make
# Device, dtype or shape, as torch.testing compares them and as pytest explains an assertion.
METADATA = re.compile(r"attribute '|(?<!dtype=)torch\.(Size|bool|u?int\d|b?float\d)")
AUTOCAST = f"{BACKENDS}::test_half_precision_and_autocast["  # on meta it changes no dtype
NOTHING = {"kernels": [], "elsewhere": [], "outcome": "", "error": ""}


def record(folder: Path, *arguments: str) -> tuple[dict, dict]:
    """Records of tests in the interpreter, and on the meta device in the place of a GPU."""
    files, processes = [], []
    for interpret in "10":
        files.append(folder / f"{interpret}.json")
        environment = {**os.environ, "TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, TESTS)))
        options = ("-q", "--tb=no", "-p", "no:cacheprovider", "-p", "launch_recorder")
        command = (sys.executable, "-m", "pytest", *options, "--record", str(files[-1]), *arguments)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, text=True))
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode in (0, 1), output  # all tests ran, whatever they found
    return tuple(by_name(json.loads(file.read_text())) for file in files)


def by_name(tests: dict[str, dict]) -> dict[str, dict]:
    """A test that a GPU runs in bfloat16 instead of float16 gets its name in the interpreter."""
    names = {name: name.replace("bfloat16", "float16") for name in tests}
    return {name if names[name] in tests else names[name]: test for name, test in tests.items()}


def problems(interpreted: dict, native: dict) -> list[str]:
    """Problems that a GPU would have with the tests that it does not skip, a line each."""
    found = []
    for name in interpreted | native:
        here, there = interpreted.get(name, NOTHING), native.get(name, NOTHING)
        if there["outcome"] == "skipped":
            continue
        missing = sorted(set(here["kernels"]) - set(there["kernels"]))
        if missing:
            found.append(f"{name}: does not launch {', '.join(missing)}")
        if there["elsewhere"]:
            kernels = ", ".join(sorted(set(there["elsewhere"])))
            found.append(f"{name}: launches {kernels} with a tensor of another device")
        if name.startswith(AUTOCAST) and there["error"].startswith("AssertionError"):
            continue
        if there["outcome"] == "failed" and not lacks_values(there["error"]):
            found.append(f"{name}: {there['error']}")
    return found


def lacks_values(error: str) -> bool:
    """Whether a test failed because meta tensors have no values.

    So this module judges no values, and no launches after a test's first assertion about values. A
    shape that a test turned into a tuple or a number counts as a value.
    """
    return error.startswith("NotImplementedError") or (
        error.startswith("AssertionError") and not METADATA.search(error)
    )


def kernels_of(tests: dict) -> set[str]:
    return {kernel for test in tests.values() for kernel in test["kernels"]}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    files = {file.relative_to(KERNELS).as_posix() for file in KERNELS.rglob("test_*.py")}
    given = (str(KERNELS / file) for file in sorted(files.difference(ON_A_CPU)))
    return record(tmp_path_factory.mktemp("recorded"), *given, BACKENDS, FULL_SIZE)


def test_files_that_are_left_out_launch_nothing():
    """The fixture of ``conftest.py`` holds them to it, and this file is one of them."""
    assert all((KERNELS / file).exists() for file in ON_A_CPU)
    with pytest.raises(pytest.fail.Exception, match="a test of ON_A_CPU launches record"):
        InterpretedFunction(record).run(grid=(1,), warmup=False)


def test_on_a_gpu_the_same_kernels_get_tensors_of_the_gpu(recorded):
    assert problems(*recorded) == []
    interpreted, native = recorded
    # Without a GPU a simulator runs these kernels, which are in Gluon.
    assert kernels_of(interpreted) | {"em_stage", "em_output", "conv_boxes"} == kernels_of(native)
    assert len(kernels_of(native)) > 10


def test_a_gpu_does_not_spend_its_time_on_compiling(recorded):
    """A kernel takes up to half a second, so eight processes have half a minute for 450 of them."""
    _, native = recorded
    assert sum(test["compiled"] for test in native.values()) <= 450


def test_a_gpu_skips_what_only_others_can_run(recorded):
    interpreted, native = recorded
    skipped = {
        test["error"]
        for name, test in native.items()
        if test["outcome"] == "skipped" != interpreted.get(name, NOTHING)["outcome"]
    }
    others = "sm_100", "gfx942"
    assert skipped == {"Skipped: bfloat16 is right on a GPU"} | {
        f"Skipped: needs a GPU of {arch}, and this one is of sm_90" for arch in others
    }


ON_THE_CPU = """
import subprocess, sys
import pytest, torch
from device import DEVICE
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv.op import conv_bias_act
from emanet_triton.kernels.resample.op import confusion_counts

X, W, B = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1)
PLACED = [t.to(DEVICE) for t in (X, W, B)]

def test_operator():
    conv_bias_act(X, W, B, backend="triton")

def test_launcher():
    conv_triton.conv_bias_act(X, W, B, None, 1, 1, True, X.dtype, "ieee", "sm_90")

def test_comparison():
    torch.testing.assert_close(conv_bias_act(*PLACED, backend="triton"), 2 * X)

def test_equality():
    assert torch.equal(conv_bias_act(*PLACED, backend="triton"), 2 * X)

def test_comparison_of_dtypes():
    torch.testing.assert_close(conv_bias_act(*PLACED, backend="triton"), 2 * PLACED[0].double())

def test_dtype():
    assert conv_bias_act(*PLACED, backend="triton").dtype == torch.float64

def test_shape():
    assert conv_bias_act(*PLACED, backend="triton").shape == (1, 1)

def test_process():
    subprocess.Popen([sys.executable, "-c", ""]).wait()
    raise RuntimeError("it started, and nobody records its launches")

def test_right():
    assert conv_bias_act(*PLACED, backend="triton").item() == 2
"""


def test_tensors_on_the_cpu_are_found(tmp_path):
    file = tmp_path / "test_on_the_cpu.py"
    file.write_text(ON_THE_CPU)
    found = problems(*record(tmp_path, str(file)))
    assert [line.partition("::")[2].partition("\n")[0] for line in found] == [
        "test_operator: does not launch conv_taps",
        "test_operator: ValueError: backend 'triton' needs tensors on a GPU, or "
        "TRITON_INTERPRET=1 set in the environment before triton is imported; got tensors on cpu",
        "test_launcher: launches conv_taps with a tensor of another device",
        "test_comparison: AssertionError: The values for attribute 'device' do not match: "
        "meta != cpu.",
        "test_equality: RuntimeError: torch.equal of tensors on meta and cpu",
        "test_comparison_of_dtypes: AssertionError: The values for attribute 'dtype' do not match: "
        "torch.float32 != torch.float64.",
        "test_dtype: AssertionError: assert torch.float32 == torch.float64",
        "test_shape: AssertionError: assert torch.Size([1, 1, 1, 1]) == (1, 1)",
    ]
