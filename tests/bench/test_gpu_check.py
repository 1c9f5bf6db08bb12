"""``gpu-check``: steps that pass, fail, hang and are cut; what a killed run leaves behind."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_check_steps import HANGS, python, stage, writes

from emanet_triton.bench import gpu_check
from emanet_triton.bench.__main__ import main
from emanet_triton.bench.gpu_check.caches import NAME
from emanet_triton.bench.gpu_check.steps import Step
from emanet_triton.errors import InputError

ROOT = Path(__file__).parents[2]

# Runs a stage of two steps: the first ends, the second writes a file and a kernel, and goes on.
RUNS = """
import sys
for name in ("PIL", "filelock", "shtab", "torchvision"):  # docs/gpu.md asks for none of them
    sys.modules[name] = None
from gpu_check_steps import python, writes
from emanet_triton.bench import __main__ as bench, gpu_check
from emanet_triton.bench.gpu_check import steps
from emanet_triton.command import run
steps.KEEP_EVERY, gpu_check.PACK_EVERY = 0.2, 0
kernel = "os.environ['TRITON_CACHE_DIR'] + '/abc/kernel.cubin'"
then = f"import os; os.mkdir(os.path.dirname({kernel})); open({kernel}, 'w').close(); "
then += "print('goes on', flush=True); time.sleep(600)"
gpu_check.make_plan = lambda stage, way: [
    writes("first", "a.txt", "of the first"),
    writes("second", "b.txt", "of the second", then),
]
run(lambda: bench.main(["gpu-check", "--rehearse", "--out", sys.argv[1]]))
"""


def results(text):
    """Step → its result, from the summary."""
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return {cells[0]: cells[1] for cells in lines if len(cells) > 2}


def members(path):
    """The files of an archive, by name."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read().decode(errors="replace") for m in tar}


def test_what_fails_or_hangs_ends_alone(tmp_path, capsys):
    planned = [
        python("first", "print('of the first')"),
        python("wrong", "print('its reason'); raise SystemExit(3)"),
        python("crash", "import os; os.abort()"),
        Step("slow", ["sleep", "600"], seconds=1),
        Step("hang", ["sh", "-c", "trap '' INT; sleep 600"], seconds=2),
        Step("missing", ["/none"], 30, needs="no-such-program"),
        Step("unstartable", ["/none"], 30),
        python("last", "pass", seconds=600),  # so that no step has more than its own time
    ]
    begin = time.monotonic()
    assert stage(tmp_path).run(planned, 400, grace=1) == 1
    assert time.monotonic() - begin < 200
    out = capsys.readouterr().out
    assert re.match(r"the stage: 2 passed, 1 absent, 5 failed, \d+ s\n", out)
    found = results(out)
    assert {step.name: found[step.name] for step in planned} == {
        "first": "passed",
        "wrong": "failed: exit code 3",
        "crash": "failed: signal SIGABRT",
        "slow": "failed: not done after 1 s",
        "hang": "failed: not done after 2 s, and hung",
        "missing": "absent: there is no no-such-program here",
        "unstartable": "failed: cannot be started: No such file or directory",
        "last": "passed",
    }
    assert "  wrong: its reason\n" in out
    assert (tmp_path / "out" / "summary-run.txt").read_text() == out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gpu-check-run.tar",
        "summary-run.txt",
    ]
    packed = members(tmp_path / "out" / "gpu-check-run.tar")
    assert packed["00-first/log.txt"].endswith("of the first\n")
    assert packed["01-wrong/log.txt"].endswith("its reason\n")


def test_what_a_step_leaves_behind_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {HANGS!r}]); "
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))"
    )
    assert stage(tmp_path).run([python("parent", code)], 60) == 0
    status = Path("/proc") / file.read_text() / "stat"
    for _ in range(600):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_without_time_nothing_is_started(tmp_path, capsys):
    planned = [python("first", "import time; time.sleep(2)", 2), python("second", "pass", 5)]
    assert stage(tmp_path).run(planned, 3.5, grace=2) == 1
    assert results(capsys.readouterr().out)["second"] == "not started: no time left"


def test_a_step_has_what_those_before_left_but_not_what_those_after_need(tmp_path, monkeypatch):
    now, limits = [0.0], []

    def run_command(command, folder, environment, limit, grace, keep):
        limits.append(limit)
        now[0] += 0.5 if folder.name.endswith("short") else limit
        return "passed"

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_check, "run_command", run_command)
    planned = [python("short", "", 20), python("long", "", 1), python("last", "", 5)]
    assert stage(tmp_path).run(planned, 10, grace=1) == 0
    assert limits == [9, 3.5, 5]


def test_children_run_natively_and_keep_their_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = (
        "import os, pathlib; assert 'TRITON_INTERPRET' not in os.environ; "
        "kernel = pathlib.Path(os.environ['TRITON_CACHE_DIR']) / 'abc' / 'kernel.cubin'; "
        "kernel.parent.mkdir(); kernel.write_text('compiled'); "
        "choice = pathlib.Path(os.environ['XDG_CACHE_HOME']) / 'emanet_triton' / 'choice.jsonl'; "
        "choice.parent.mkdir(); choice.write_text('{}')"
    )
    made = stage(tmp_path)
    assert made.run([python("first", code)], 60) == 0
    with (
        tarfile.open(tmp_path / "out" / "gpu-check-run.tar") as tar,
        tarfile.open(fileobj=tar.extractfile("triton_cache.tar.xz")) as inner,
    ):
        names = inner.getnames()
    assert names == ["triton/abc/kernel.cubin", "xdg/emanet_triton/choice.jsonl"]


def test_the_kernels_of_a_long_step_are_packed_once_a_minute(tmp_path):
    made = stage(tmp_path)
    (made.caches.triton / "abc").mkdir()
    (made.caches.triton / "abc" / "kernel.cubin").write_text("compiled")
    made._keep()
    assert not (made.archive.folder / NAME).exists()
    made._packed_at -= gpu_check.PACK_EVERY
    made._keep()
    assert (made.archive.folder / NAME).exists()
    assert gpu_check.PACK_EVERY == 60


@pytest.mark.parametrize(("hits", "told"), [(0, True), (3, False)])
def test_a_carried_cache_without_a_hit_is_told(tmp_path, capsys, hits, told):
    entry = tmp_path / "cache" / "ABC"
    entry.mkdir(parents=True)
    (entry / "other.cubin").write_text("x")
    warm = {"arch": "sm_90", "planned": 9, "distinct": 5, "hits": hits, "compiled": 5 - hits}
    warm |= {"failed": [], "launchers": "", "seconds": 1.0}
    step = writes("warm", "warm.json", json.dumps(warm))
    assert stage(tmp_path, tmp_path / "cache").run([step], 60) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "kernels carried: 1" in lines
    missed = "no carried kernel was used: another Triton, Python, GPU or kernel source"
    assert (missed in lines) == told


def test_a_summary_that_fails_does_not_end_the_run(tmp_path, capsys):
    step = writes("warm", "warm.json", '{"of another": "form"}')
    assert stage(tmp_path).run([step, python("last", "pass")], 60) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["no summary: KeyError: 'failed'", "warm: passed", "last: passed"]


def start(tmp_path):
    """A run whose second step goes on, once the archive has all that this step writes."""
    command = [sys.executable, "-c", RUNS, str(tmp_path / "out")]
    paths = f"{ROOT}:{Path(__file__).parent}"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_hangup
    )
    path = tmp_path / "out" / "gpu-check-run.tar"
    for _ in range(1200):
        found = members(path) if path.exists() else {}
        if "goes on" in found.get("01-second/log.txt", "") and "triton_cache.tar.xz" in found:
            return process, path
        time.sleep(0.1)
    process.kill()
    pytest.fail("the second step has not begun, or is not kept")


def heed_hangup():
    """Undo ``nohup``, which these tests may have been started with."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def is_running(folder):
    """Whether a process has a path in this folder among its arguments."""
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if str(folder).encode() in arguments.read_bytes():
                return True
    return False


def test_a_killed_run_leaves_what_there_is_and_no_step(tmp_path):
    process, path = start(tmp_path)
    process.kill()
    process.wait()
    packed = members(path)
    assert packed["00-first/a.txt"] == "of the first"
    assert packed["01-second/b.txt"] == "of the second"
    assert results(packed["summary-run.txt"])["first"] == "passed"
    assert (tmp_path / "out" / "summary-run.txt").read_text() == packed["summary-run.txt"]
    with tarfile.open(path) as tar, tarfile.open(fileobj=tar.extractfile(NAME)) as inner:
        assert "triton/abc/kernel.cubin" in inner.getnames()
    for _ in range(600):
        if not is_running(tmp_path):
            return
        time.sleep(0.1)
    pytest.fail("the step still runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM], ids=str)
def test_ctrl_c_ends_the_step_and_prints_the_summary(tmp_path, number):
    process, path = start(tmp_path)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    found = results(out)
    assert (found["first"], found["second"]) == ("passed", "interrupted")
    assert (tmp_path / "out" / "summary-run.txt").read_text() == out
    packed = members(path)
    assert packed["01-second/b.txt"] == "of the second"
    assert packed["01-second/log.txt"].endswith("KeyboardInterrupt\n")
    assert packed["summary-run.txt"] == out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 2
    assert capsys.readouterr().err == (
        "error: gpu-check needs a GPU, and PyTorch finds none here; --rehearse does without\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "all"], r"argument --stage: invalid choice: 'all' \(choose from .*\)"),
        (
            ["--processes", "0"],
            "argument --processes: expected a whole number of at least 1, got '0'",
        ),
        (["--out", "/proc/none"], "--out /proc/none: cannot be made: No such file or directory"),
        (["--out", __file__], f"--out {__file__}: is a file, expected a folder"),
        (["--triton-cache", "/none"], "--triton-cache /none: there is no such file or folder"),
        (
            ["--triton-cache", __file__],
            f"--triton-cache {__file__}: expected a folder of Triton's, or the tar of a stage",
        ),
        (
            ["--triton-cache", str(Path(__file__).parent)],
            f"--triton-cache {Path(__file__).parent}: holds no compiled kernels",
        ),
    ],
    ids=["stage", "processes", "folder", "file", "no cache", "no archive", "no kernels"],
)
def test_bad_input_ends_with_one_message(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(gpu_check, "make_plan", lambda stage, way: [])
    given = ["gpu-check", "--rehearse", "--out", str(tmp_path), *arguments]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"error: {message}", line)


def test_a_folder_serves_a_stage_once(tmp_path):
    stage(tmp_path)  # another run, which has just begun
    refused = "out: holds files of a stage run already; give another folder$"
    with pytest.raises(InputError, match=refused):
        stage(tmp_path, work="second")
    (tmp_path / "out" / "summary-run.txt").rename(tmp_path / "out" / "summary-rows.txt")
    (tmp_path / "out" / "gpu-check-run.tar").write_text("of a run before")
    with pytest.raises(InputError, match=refused):
        stage(tmp_path, work="third")
    (tmp_path / "out" / "gpu-check-run.tar").rename(tmp_path / "out" / "gpu-check-rows.tar")
    stage(tmp_path, work="fourth")


def test_make_runs_a_stage():
    made = "STAGE=rows OUT=here PYTHON=py ARGS=--tiny"
    command = ["make", "--no-print-directory", "-n", "gpu-check", *made.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    command = " ".join(done.stdout.replace("\\\n", "").split())
    assert command == (
        "PYTHONPATH=. py -m emanet_triton.bench gpu-check --stage rows --out here --tiny"
    )
