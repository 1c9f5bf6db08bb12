"""``gpu-check`` with steps that pass, fail and hang; what the real steps are."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from example_rows import row, without_times

from emanet_triton.bench import gpu_check
from emanet_triton.bench.__main__ import main
from emanet_triton.bench.gpu_check import Step, run_steps
from emanet_triton.bench.options import NETWORKS, Selection, parse
from emanet_triton.bench.rows import write_csv
from emanet_triton.bench.suites import SUITES


def python(name, code, seconds=30.0, rows=None):
    return Step(name, [sys.executable, "-c", code], seconds, rows)


def results(text):
    """Step → its result, from the summary."""
    lines = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return {cells[0]: cells[1] for cells in lines if len(cells) > 2}


HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


def test_what_fails_or_hangs_ends_alone(tmp_path, capsys):
    steps = [
        python("first", "print('of the first')"),
        python("wrong", "raise SystemExit(3)"),
        python("crash", "import os; os.abort()"),
        python("slow", "import time; time.sleep(60)", seconds=1),
        python("hang", HANGS, seconds=2),
        python("last", "pass"),
    ]
    start = time.monotonic()
    assert run_steps(steps, tmp_path / "out", 60, grace=1) == 1
    assert time.monotonic() - start < 30
    out = capsys.readouterr().out
    found = results(out)
    assert {name: found[name] for name in ("first", "wrong", "crash", "slow", "hang", "last")} == {
        "first": "passed",
        "wrong": "failed: exit code 3",
        "crash": "failed: signal SIGABRT",
        "slow": "failed: not done after 1 s",
        "hang": "failed: not done after 2 s, and hung",
        "last": "passed",
    }
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "of the first" in log
    assert log.endswith(out)


def test_what_a_step_leaves_behind_ends_with_it(tmp_path):
    file = tmp_path / "pid"
    code = (
        "import pathlib, subprocess, sys; "
        f"child = subprocess.Popen([sys.executable, '-c', {HANGS!r}]); "
        f"pathlib.Path({str(file)!r}).write_text(str(child.pid))"
    )
    assert run_steps([python("parent", code)], tmp_path, 60) == 0
    status = Path("/proc") / file.read_text() / "stat"
    for _ in range(50):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_a_stopped_suite_keeps_its_rows_and_the_summary_shows_them(tmp_path, capsys):
    path = tmp_path / "em.csv"
    mmseg = row("em", "block", "mmseg", 4.0)
    wrong = without_times(mmseg, "graph", "failed: error 1")
    write_csv(path, [mmseg, row("em", "block", "triton", 2.0, 2.0), wrong])
    assert run_steps([python("em", "pass", rows=path)], tmp_path, 60) == 0
    out = capsys.readouterr().out
    assert re.search(r"em +passed +\d+ +2 of 3 +triton 2\.00–2\.00", out)
    assert out.endswith("em: block: graph failed: error 1\n")


def test_half_a_file_is_no_crash(tmp_path, capsys):
    path = tmp_path / "em.csv"
    path.write_text("suite,case\nem")
    assert run_steps([python("em", "pass", rows=path)], tmp_path, 60) == 0
    assert "0 of 0" in capsys.readouterr().out


def test_without_time_nothing_is_started(tmp_path, capsys):
    assert run_steps([python("first", "pass")], tmp_path, 5) == 1
    assert "not started: no time left" in capsys.readouterr().out


def test_children_run_natively(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; assert 'TRITON_INTERPRET' not in os.environ"
    assert run_steps([python("first", code)], tmp_path, 60) == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu-check"]) == 2
    assert capsys.readouterr().err == "error: gpu-check needs a GPU, and PyTorch finds none here\n"
    assert main(["gpu-check", "--what"]) == 2


def test_a_folder_that_cannot_be_written():
    with pytest.raises(gpu_check.InputError, match="/proc/none: cannot be written"):
        run_steps([], Path("/proc/none"), 1)


@pytest.mark.parametrize("has_pytest", [True, False])
def test_the_steps_fit_and_name_what_exists(tmp_path, monkeypatch, has_pytest):
    if not has_pytest:
        monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    steps = gpu_check.gpu_steps(tmp_path)
    assert gpu_check.SECONDS < 480
    assert len({step.rows for step in steps if step.rows}) + 1 <= 8  # files, with the log
    assert steps[0].name.startswith("correct")
    for step in steps:
        if "pytest" in step.command:
            assert has_pytest
            files = [part for part in step.command if part.endswith(".py")]
            assert files
            assert all(Path(file).is_file() for file in files)
        else:
            _check_suite_arguments(list(step.command[3:]))


def _check_suite_arguments(arguments):
    """They parse, and name providers that a case of the suite on a GPU has."""
    options = parse(arguments, list(SUITES))
    assert set(options.networks) <= set(NETWORKS)
    for suite in options.suites:
        selection = Selection(
            "cuda",
            sizes=tuple(options.sizes),
            dtypes=tuple(options.dtypes),
            networks=tuple(options.networks),
            providers=tuple(options.providers),
        )
        names = {name for case in SUITES[suite](selection) for name in case.providers}
        assert names
        assert set(options.providers) <= names
