"""The steps of each stage, the most important first."""

import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from emanet_triton.bench.gpu_check.families import CHOSEN, FAMILIES
from emanet_triton.bench.gpu_check.own import REHEARSAL, SILENCE
from emanet_triton.bench.gpu_check.steps import OUT, Step
from emanet_triton.versions import ROOT

SECONDS = 540  # limit of a stage
REHEARSAL_SECONDS = 3600  # limit of a rehearsal, whose time costs nothing
BENCH = (sys.executable, "-m", "emanet_triton.bench")
OWN = f"{BENCH[2]}.gpu_check."
SEARCHING = ("model", "train-mem")  # suites with longer silences
ON_A_CPU = (  # files of tests that run no kernel on a GPU
    *("test_launch.py", "test_native.py", "test_threads.py"),
    *("test_tape.py", "test_tape_keys.py", "test_tape_refusals.py"),
    *("conv/test_conv_boxes.py", "conv/test_conv_tiles.py"),
    *("test_cache.py", "test_flops.py", "test_precision.py"),
    *("test_relaunch.py", "test_settings.py"),
    *("conv/test_cpu_choice.py", "conv/test_int8.py", "conv/test_onednn.py"),
    *("conv/test_exact.py", "conv/test_winograd.py"),
    *("em/test_em_eager.py", "em/test_em_passes.py", "em/test_em_reference.py"),
    *("em/test_em_output.py", "em/test_em_stage.py", "test_kernel_keys.py"),
)
NCU_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)


class Way(NamedTuple):
    """How a stage runs.

    Attributes:
        rehearse: whether it runs without a GPU and measures nothing.
        tiny: whether all cases are few and small.
        arch: what a rehearsal compiles kernels for.
        processes: how many compile at once.
    """

    rehearse: bool
    tiny: bool
    arch: str
    processes: int


def make_plan(stage: str, way: Way) -> list[Step]:
    """The steps of "run", "profile" or "rows"."""
    return [
        _own(way, "versions", "", 15, rehearse=False),
        *STAGES[stage](way),
        _own(way, "versions-after", "", 10, module="versions", rehearse=False),
    ]


def _run(way: Way) -> list[Step]:
    """Does it run, is it right, how fast is it?"""
    model = "plain-bf16 cudnn-bf16 triton-bf16 fused-bf16 fastest-bf16"
    conv = "torch cudnn triton gluon separate"
    kernels = (name for name in FAMILIES if not name.startswith(CHOSEN))
    return [
        _warm(way, 50),
        _own(way, "correct", " ".join(kernels), 80),
        _own(way, "choose", "chosen-half", 70, module="correct"),
        _suite(
            *(way, "model", "model", 85),
            f"--networks r50 --cases from=device --providers {model} --seconds 2 --rounds 9",
        ),
        _suite(
            *(way, "conv", "conv", 70),
            f"--networks r50 --dtypes bf16 --providers {conv} --seconds 0.2 --rounds 5",
        ),
        _suite(
            *(way, "em", "em", 30),
            "--sizes 1024x2048 --batches 1 8 --dtypes bf16 --seconds 0.5 "
            "--providers mmseg ours-torch triton one-pass-128 one-pass-16",
        ),
        _suite(way, "post", "post", 25, "--dtypes bf16 --seconds 0.5 --providers plain triton"),
        _own(way, "trace", "", 40),
        _sanitizer(way, "memcheck", 25),
        _tests(way, 30),
    ]


def _profile(way: Way) -> list[Step]:
    """Where does the time go?"""
    return [
        _warm(way, 75, "--sweep"),
        _own(way, "sweep", "", 235),
        _ncu(way, 110),
        _own(way, "trace", "", 60),
        _sanitizer(way, "racecheck", 25),
    ]


def _rows(way: Way) -> list[Step]:
    """Rows for ``benchmarks/results``, and predicted images to look at."""
    model = "plain-fp32 plain-bf16 fused-fp32 fused-bf16"
    return [
        _warm(way, 45),
        _own(way, "correct", "chosen", 60),  # tiles may have changed: the search happens again
        _suite(
            *(way, "model", "model_gpu", 195),
            "--cases 'whole 1024x2048' 'slide 1024x2048' --seconds 2 --rounds 9 "
            f"--providers {model}",
        ),
        _suite(
            *(way, "conv", "conv_gpu", 55),
            "--networks r50 --dtypes bf16 --seconds 0.3 --rounds 7 "
            "--providers torch cudnn cudnn-benchmark separate triton gluon",
        ),
        _suite(
            *(way, "em", "em_gpu", 40),
            "--sizes 1024x2048 --batches 1 8 --dtypes bf16 fp32 --seconds 1",
        ),
        _suite(way, "post", "post_gpu", 20, "--seconds 0.5 --providers plain triton"),
        _suite(way, "train-mem", "train_mem_gpu", 60, "--networks r50 --rounds 3 --seconds 2"),
        _pictures(way, 25),
        # A build takes longer: it uses the time that other steps have left.
        _tool(way, "tensorrt", [*_own_command("tensorrt"), "--out", OUT], 5, "trtexec"),
    ]


STAGES: dict[str, Callable[[Way], list[Step]]] = {"run": _run, "profile": _profile, "rows": _rows}


def _own(
    way: Way, name: str, given: str, seconds: float, *, module: str = "", rehearse: bool = True
) -> Step:
    """A step that is a module of this package. ``rehearse``: whether a rehearsal differs."""
    arguments = [*shlex.split(given), "--out", OUT]
    if rehearse and way.rehearse:
        arguments += ["--rehearse", "--arch", way.arch]
    arguments += ["--tiny"] if way.tiny else []
    return Step(name, [*_own_command(module or name), *arguments], seconds)


def _warm(way: Way, seconds: float, given: str = "") -> Step:
    # A rehearsal may run on a machine of few cores, and has the time.
    seconds = REHEARSAL_SECONDS if way.rehearse else seconds
    return _own(way, "warm", f"{given} --processes {way.processes}".strip(), seconds)


def _suite(way: Way, suite: str, name: str, seconds: float, given: str) -> Step:
    """A suite of the benchmark, which writes its rows to ``NAME.csv``."""
    arguments = ["--tiny", "--rounds", "3"] if way.tiny else shlex.split(given)
    command = [OWN + "rehearsal"] if way.rehearse else [BENCH[2]]
    command = [*BENCH[:2], *command, suite, "--device", "cuda", *arguments]
    silence = seconds if suite in SEARCHING else SILENCE
    command += ["--silence", str(silence), "--csv", f"{OUT}/{name}.csv"]
    return Step(name, command, seconds)


def _own_command(module: str) -> list[str]:
    return [sys.executable, "-m", OWN + module]


def _tool(way: Way, name: str, command: Sequence[str], seconds: float, needs: str) -> Step:
    """A step that needs a program which may not be installed. It is absent in a rehearsal."""
    return Step(name, command, seconds, needs, REHEARSAL if way.rehearse else "")


def _sanitizer(way: Way, tool: str, seconds: float) -> Step:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += _own_command("single")
    # Else tensors share allocations, and the tool does not see an access beyond a tensor.
    command = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command]
    return _tool(way, tool, command, seconds, "compute-sanitizer")


def _ncu(way: Way, seconds: float) -> Step:
    sections = [part for section in NCU_SECTIONS for part in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", *sections]
    command += ["--csv", "--page", "raw", "--log-file", f"{OUT}/ncu.csv"]
    command += [*_own_command("single"), "--large"]
    return _tool(way, "ncu", command, seconds, "ncu")


def _pictures(way: Way, seconds: float) -> Step:
    """The shipped demonstration's predictions of two scenes."""
    command = [sys.executable, "-m", "emanet_triton.eval", "--device", "cuda", "--limit", "2"]
    command += ["--save-predictions", f"{OUT}/predictions", "--save-overlays", f"{OUT}/overlays"]
    return Step("pictures", command, seconds, absent=REHEARSAL if way.rehearse else "")


def _tests(way: Way, seconds: float) -> Step:
    """The tests of the kernels that run on a GPU."""
    folder = ROOT / "tests" / "kernels"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    command += [f"--ignore={folder / file}" for file in ON_A_CPU]
    command += [str(folder), *(["-n", "8"] if importlib.util.find_spec("xdist") else [])]
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, *command]
    step = _tool(way, "tests", command, seconds, "pytest")
    return step if folder.is_dir() else replace(step, absent="there are no tests here")
