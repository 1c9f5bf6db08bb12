"""A short run of each fuzzer, and whether their driver sees what goes wrong."""

import json
import subprocess
import sys

import pytest

from tests.fuzz.child import Limits
from tests.fuzz.driver import ROOT, ChildError, fuzz, kinds

TOY = """
import os, time

def attempt(seed, folder):
    (folder / "file").touch(exist_ok=False)
    return ACTIONS[seed]()

def wrong():
    assert 1 == 2, "one is not two"

def endless():
    while True:
        pass

def waits():
    time.sleep(3600)

def large():
    bytes(2**20) * 300
    return "right"

ACTIONS = [
    lambda: "right", lambda: "refused", lambda: "other", wrong, lambda: {}["none"], os.abort,
    lambda: os._exit(0), endless, waits, large, lambda: bytearray(2**32), lambda: "right"
]
"""
EXPECTED = {
    "right": ("right", ""),
    "refused": ("refused", ""),
    "neither": ("crashed", "attempt returned 'other'"),
    "wrong": ("wrong", "AssertionError: one is not two"),
    "exception": ("crashed", "KeyError: 'none'"),
    "abort": ("crashed", "the process died with exit code -6"),
    "exit": ("crashed", "the process died with exit code 0"),
    "endless": ("hung", "no answer after 1 s of CPU time"),
    "waits": ("hung", "no answer after 6 s"),
    "memory": ("crashed", "memory grew by 300 MiB (right)"),
    "allocation": ("crashed", "MemoryError"),
    "right again": ("right", ""),
}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """A folder for kinds named toys.NAME."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "toys").mkdir()
    return tmp_path / "toys"


@pytest.mark.parametrize("kind", kinds())
def test_a_hundred_files_are_read_right_or_refused(kind):
    report = fuzz(kind, range(100))
    assert report.failures == []
    assert report.count("right") + report.count("refused") == 100
    assert report.count("right") and report.count("refused")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(outcome, first and last line of its detail) of each action of the toy kind."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toys").mkdir()
    (folder / "toys" / "all.py").write_text(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        report = fuzz("toys.all", range(len(EXPECTED)), Limits(1, 6, 2**28))
    lines = {seed: ended.detail.splitlines() or [""] for seed, ended in report.files.items()}
    return {
        name: (report.files[seed].outcome, lines[seed][0], lines[seed][-1])
        for seed, name in enumerate(EXPECTED)
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_the_driver_sees(name, outcomes):
    outcome, detail = EXPECTED[name]
    assert outcomes[name][0] == outcome
    assert detail in outcomes[name][1:]


def test_a_kind_that_cannot_be_imported(toys):
    (toys / "broken.py").write_text("import none_such\n")
    with pytest.raises(ChildError) as error:
        fuzz("toys.broken", range(3))
    assert str(error.value).startswith("toys.broken: the process died with exit code 1\n")
    assert "No module named 'none_such'" in str(error.value)


def test_a_kind_that_always_dies_is_given_up(toys, monkeypatch):
    monkeypatch.setattr("tests.fuzz.driver.MOST_DEATHS", 2)
    (toys / "dying.py").write_text("import os\n\ndef attempt(seed, folder):\n    os.abort()\n")
    assert [ended.seed for ended in fuzz("toys.dying", range(5, 10)).failures] == [5, 6]


def run(*arguments):
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_names_what_repeats_a_failure(toys, tmp_path):
    (toys / "odd.py").write_text(
        "def attempt(seed, folder):\n    assert seed != 4, 'four'\n    return 'right'\n"
    )
    out = tmp_path / "figures.json"
    done = run("toys.odd", "--seed", "3", "--files", "4", "--out", str(out))
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [
        "toys.odd 4: wrong",
        "    python -m tests.fuzz toys.odd --seed 4 --files 1",
    ]
    assert lines[-1].split()[:7] == ["toys.odd", "4", "3", "0", "1", "0", "0"]
    (figures,) = json.loads(out.read_text())
    assert {name: figures[name] for name in ("kind", "first_seed", "files", "right", "wrong")} == {
        "kind": "toys.odd",
        "first_seed": 3,
        "files": 4,
        "right": 3,
        "wrong": 1,
    }
    assert [failure["seed"] for failure in figures["failures"]] == [4]
    assert run("toys.odd", "--seed", "5", "--files", "1").returncode == 0


def test_the_command_refuses_a_kind_that_there_is_not():
    done = run("none")
    assert done.returncode == 2
    assert f"no such kind: none; there are {', '.join(kinds())}" in done.stderr
