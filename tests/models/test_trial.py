"""The trial in another process, and every way in which it can end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from emanet_triton.models import trial
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.trial import Trial, Verdict

SMALL = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
TRIAL = Trial("fused", EMANet, SMALL, 19, 32, 64, 1, True, "auto", "float32", "cpu")
SOUND = Verdict(None)


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_whether_backends_are_measured(monkeypatch):
    """A trial that measured none says nothing about those that another process would measure."""
    model = EMANet(SMALL, Protocol((64, 32))).eval()
    given = "fused", model, torch.float32, torch.device("cuda", 0)
    assert Trial.of(*given).measures
    monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    assert not Trial.of(*given).measures


def test_of_a_model():
    model = EMANet(SMALL, Protocol((64, 32))).eval()
    device = torch.device("cuda", 1)
    found = Trial.of("fused", model, torch.bfloat16, device)
    assert found == replace(TRIAL, dtype="bfloat16", device="cuda:1")
    sliding = Protocol((64, 32), "slide", crop=(33, 35), stride=(17, 17))
    found = Trial.of("plain", EMANet(SMALL, sliding, 5), torch.float32, device)
    assert (found.network, found.height, found.width, found.num_classes) == ("plain", 33, 35, 5)
    assert (found.windows, Trial.of("fused", model, torch.float32, device).windows) == (3, 1)
    many = Protocol((640, 320), "slide", crop=(32, 32), stride=(32, 32))
    assert Trial.of("fused", EMANet(SMALL, many), torch.float32, device).windows == 64


@pytest.mark.parametrize(
    "asked",
    [
        TRIAL,
        replace(TRIAL, network="fastest", dtype="bfloat16"),
        replace(TRIAL, network="plain", dtype="bfloat16"),
    ],
    ids=["fused-fp32", "fastest-bf16", "plain-bf16"],
)
def test_a_child_finds_the_network_sound(asked, monkeypatch, tmp_path):
    """Although another package has the name of ours, and ours was loaded as by torch.hub."""
    (tmp_path / "emanet_triton.py").write_text("raise ImportError('another package')")
    monkeypatch.chdir(tmp_path)
    own = str(Path(trial.__file__).parents[2])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if path != own)])
    assert trial.run(asked) == SOUND


@pytest.mark.parametrize(("network", "backend"), [("fused", "auto"), ("fastest", "fastest")])
def test_kernels_in_gluon_are_tried_if_they_are_asked_for(network, backend, monkeypatch):
    tried = []
    monkeypatch.setattr(trial, "disagreement", lambda fused, *_: tried.append(fused))
    assert trial.attempt(replace(TRIAL, network=network)) == SOUND
    found = {module.backend for module in tried[0].modules() if hasattr(module, "backend")}
    assert found == {backend}


class Noted:
    """A network that notes the sizes of its inputs, and may fail for more than ``most`` of them."""

    def __init__(self, failure=None, most=0):
        self.sizes, self.failure, self.most = [], failure, most

    def choose_by(self, backend):
        return True

    def __call__(self, images):
        self.sizes.append(tuple(images.shape))
        assert images.std() > 0.5  # noise: a kernel that reads the wrong element is found
        assert torch.is_inference_mode_enabled()
        if self.failure and len(images) > self.most:
            raise self.failure


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("failure", "most", "runs", "problem"),
    [
        (None, 0, [9], None),
        (NO_MEMORY, 2, [9, 4, 2], None),
        (NO_MEMORY, 0, [9, 4, 2, 1], None),
        (RuntimeError("illegal memory access"), 2, [9], "RuntimeError: illegal memory access"),
    ],
    ids=["none", "memory", "no-memory", "kernel"],
)
def test_a_trial_runs_all_windows_of_an_image_first(monkeypatch, failure, most, runs, problem):
    noted = Noted(failure, most)
    monkeypatch.setattr(trial, "fuse", lambda *_, **__: noted)
    compared = []
    monkeypatch.setattr(trial, "disagreement", lambda *given: compared.append(given))
    assert trial.attempt(replace(TRIAL, windows=9)) == Verdict(problem)
    assert noted.sizes == [(number, 3, 32, 64) for number in runs]
    assert len(compared) == (0 if problem else 1)


def test_without_memory_for_the_noise_the_comparison_decides(monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trial, "fuse", lambda *_, **__: Noted())
    monkeypatch.setattr(trial, "_generated", lambda _: torch.nn.Identity())
    monkeypatch.setattr(torch, "randn", no_memory)
    monkeypatch.setattr(trial, "disagreement", lambda *_: None)
    assert trial.attempt(TRIAL) == SOUND


def test_a_child_runs_kernels_natively(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tell = "import os; print('{\"problem\": \"' + os.environ.get('TRITON_INTERPRET', 'no') + '\"}')"
    assert trial.run(TRIAL, child(tell)) == Verdict("no")


def test_a_child_finds_what_is_wrong():
    wrong = (
        "from emanet_triton.models import trial\n"
        "fuse = trial.fuse\n"
        "def doubled(model, **options):\n"
        "    network = fuse(model, **options)\n"
        "    network.decode_head.conv_seg.weight *= 2\n"
        "    return network\n"
        "trial.fuse = doubled\n"
        "trial.main()\n"
    )
    found = trial.run(TRIAL, child(wrong))
    assert re.fullmatch(r"relative error \S+, expected at most 1\.0e-04", found.problem)
    assert found.lasting


ENDS = {
    "dies": (
        "import os, sys; print('illegal access', file=sys.stderr, flush=True); os.abort()",
        Verdict("its trial was ended by Aborted: illegal access"),
    ),
    "is-killed": (
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        Verdict("its trial was ended by Killed: no message", lasting=False),
    ),
    "fails": (
        "raise SystemExit('no such module')",
        Verdict("its trial failed with exit code 1: no such module", lasting=False),
    ),
    "is-silent": ("", Verdict("its trial gave no verdict", lasting=False)),
    "prints-garbage": ("print('{')", Verdict("its trial gave no verdict", lasting=False)),
    "prints-a-list": ("print([1])", Verdict("its trial gave no verdict", lasting=False)),
    "prints-more": (
        "print('a library says'); print('{\"problem\": null, \"lasting\": true}')",
        SOUND,
    ),
}


@pytest.mark.parametrize(("code", "wanted"), ENDS.values(), ids=ENDS)
def test_how_a_child_may_end(code, wanted):
    assert trial.run(TRIAL, child(code)) == wanted


def test_a_child_that_hangs_is_ended_with_all_that_it_has_started(tmp_path):
    file = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "compiler = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(file)!r}, 'w').write(str(compiler.pid))\n"
        "time.sleep(60)\n"
    )
    begin = time.monotonic()
    found = trial.run(TRIAL, child(code), seconds=2)
    assert time.monotonic() - begin < 30
    assert found == Verdict("its trial has not ended after 2 seconds")
    wait_until_gone(file.read_text())


def test_a_child_that_a_driver_keeps_is_left_alone(monkeypatch):
    kept = []
    monkeypatch.setattr(os, "killpg", lambda process, number: kept.append(process))
    monkeypatch.setattr(trial, "SECONDS_TO_END", 0.2)
    begin = time.monotonic()
    found = trial.run(TRIAL, child("import time; time.sleep(60)"), seconds=0.5)
    assert time.monotonic() - begin < 30
    assert found == Verdict("its trial has not ended after 0.5 seconds")
    monkeypatch.undo()
    os.killpg(kept[0], signal.SIGKILL)


def test_a_child_that_hangs_is_ended_on_windows(monkeypatch):
    monkeypatch.delattr(os, "killpg")
    found = trial.run(TRIAL, child("import time; time.sleep(5)"), seconds=0.2)
    assert found == Verdict("its trial has not ended after 0.2 seconds")


def test_a_child_does_not_outlive_a_parent_that_is_killed(tmp_path):
    """A killed parent cannot end the processes that it has started."""
    file = tmp_path / "pid"
    waits = (
        "import os, time\n"
        "from emanet_triton.models import trial\n"
        "def attempt(trial):\n"
        f"    open({str(file)!r}, 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "trial.attempt = attempt\n"
        "trial.main()\n"
    )
    tries = f"import test_trial as t; t.trial.run(t.TRIAL, t.child({waits!r}))"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    parent = subprocess.Popen(child(tries), env=os.environ | {"PYTHONPATH": paths})
    wait_until(lambda: file.exists() and file.read_text())
    parent.kill()
    parent.wait()
    wait_until_gone(file.read_text())


def wait_until_gone(process):
    """Wait until a process has ended, or only waits to be reaped."""

    def is_gone():
        try:
            return Path(f"/proc/{process}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    wait_until(is_gone)


def wait_until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_child_that_cannot_be_started():
    found = trial.run(TRIAL, ["/no/such/python"])
    assert found.problem.startswith("its trial cannot be started: ")
    assert not found.lasting


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (RuntimeError("illegal memory access\nand more"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
    ],
    ids=["kernel", "memory"],
)
def test_a_network_that_raises(monkeypatch, error, lasting):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(trial, "fuse", fail)
    first = str(error).splitlines()[0]
    assert trial.attempt(TRIAL) == Verdict(f"{type(error).__name__}: {first}", lasting)


def test_a_device_that_cannot_be_used_tells_nothing():
    found = trial.attempt(replace(TRIAL, device="cuda:99"))
    assert not found.lasting


@pytest.fixture
def trials(monkeypatch):
    """A GPU, and children that return ``verdict``; gives the list of trials."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    tried = []
    monkeypatch.setattr(trial, "run", lambda asked: tried.append(asked) or verdicts[-1])
    verdicts = [SOUND]
    trial._cache.cache_clear()
    yield tried, verdicts
    trial._cache.cache_clear()


ON_GPU = replace(TRIAL, device="cuda:0")
BROKEN = "its trial was ended by Aborted: illegal access"


def forget():
    """Forget verdicts in memory, as in another process."""
    trial._cache.cache_clear()


@pytest.mark.parametrize("problem", [None, BROKEN], ids=["sound", "broken"])
def test_a_verdict_is_kept_on_disk(trials, problem):
    tried, verdicts = trials
    verdicts.append(Verdict(problem))
    assert trial.problem_of(ON_GPU) == problem
    forget()
    verdicts.append(Verdict("another verdict"))
    [path] = Path(os.environ["XDG_CACHE_HOME"]).glob("emanet_triton/*")
    assert path.name == "trials.jsonl"
    kept = problem and f"{problem}; found earlier: to have it tried again, delete {path}"
    assert trial.problem_of(ON_GPU) == kept
    assert trial.problem_of(replace(ON_GPU, device="cuda:1")) == kept  # the same kind of GPU
    assert tried == [ON_GPU]
    assert problem is None or BROKEN in json.dumps(json.loads(path.read_text()))


def test_what_a_child_has_measured_is_read(trials, monkeypatch):
    tried, _ = trials
    seen = []
    monkeypatch.setattr(trial.choice, "reread", lambda: seen.append(list(tried)))
    for _ in range(2):  # the second time there is no child
        trial.problem_of(ON_GPU)
    assert seen == [[ON_GPU]]


def test_a_verdict_that_does_not_last_is_not_kept(trials):
    tried, verdicts = trials
    verdicts.append(Verdict("OutOfMemoryError: CUDA out of memory.", lasting=False))
    assert trial.problem_of(ON_GPU) == "OutOfMemoryError: CUDA out of memory."
    verdicts.append(SOUND)
    assert trial.problem_of(ON_GPU) is None
    assert len(tried) == 2


CHANGES = {
    "network": {"network": "plain"},
    "architecture": {"architecture": replace(SMALL, num_bases=8)},
    "classes": {"num_classes": 5},
    "size": {"width": 65},
    "windows": {"windows": 8},
    "search": {"measures": False},
    "backend": {"backend": "torch"},
    "dtype": {"dtype": "float16"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_anything_else_is_tried_anew(trials, change):
    trial.problem_of(ON_GPU)
    trial.problem_of(replace(ON_GPU, **change))
    assert len(trials[0]) == 2


@pytest.mark.parametrize("what", ["device", "sources"])
def test_another_environment_is_tried_anew(trials, monkeypatch, what):
    trial.problem_of(ON_GPU)
    forget()
    if what == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another GPU")
    else:
        monkeypatch.setattr(trial, "digest", lambda files: "12345678")
    trial.problem_of(ON_GPU)
    assert len(trials[0]) == 2


def test_kernels_and_models_are_digested(trials, monkeypatch):
    digested = []
    monkeypatch.setattr(trial, "digest", lambda files: str(digested.extend(files)))
    trial.problem_of(ON_GPU)
    assert {"block.py", "implicit_gemm.py", "fused.py", "trial.py"} <= {f.name for f in digested}
