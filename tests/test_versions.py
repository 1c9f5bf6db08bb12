"""``tools/test_versions.py`` with virtual environments that only note how they are called."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "test_versions.py"
NAMES = ("oldest", "pip", "newest")

# A stand-in for the python of an environment. pytest fails where a file "fails" lies beside it, pip
# where a file "offline" does, and mypy where a file "untyped" does.
PYTHON = """#!/bin/sh
folder=$(dirname "$(dirname "$0")")
name=$(basename "$folder")
echo "$name [$PIP_CONFIG_FILE|$PIP_CONSTRAINT] $OMP_NUM_THREADS $*" >> "$folder/../calls"
case "$*" in
    "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip"*) test ! -e "$folder/offline" ;;
    "-m mypy"*) test ! -e "$folder/untyped" ;;
    "-c "*) echo "torch of $name, Triton of $name" ;;
    *)
        failures=0; test ! -e "$folder/fails" || failures=2
        suite="tests='9' skipped='3' failures='$failures' errors='0'"
        test -e "$folder/stops" || echo "<testsuites><testsuite $suite/></testsuites>" \
            > "$folder/results.xml"
        test $failures = 0 -a ! -e "$folder/stops" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the script and the three environments."""
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    for name in NAMES:
        python = tmp_path / ".venvs" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
    return tmp_path


def run(clone, *arguments):
    """Exit code, the lines of the summary, and how the environments were called."""
    command = [sys.executable, str(clone / "tools" / SCRIPT.name), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "PIP_CONFIG_FILE": "own"}
    environment["PIP_CONSTRAINT"] = "own.txt"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    calls = (clone / ".venvs" / "calls").read_text().splitlines()
    return done.returncode, done.stdout.splitlines(), calls


def test_each_is_installed_and_tested(clone):
    code, lines, calls = run(clone, "-k", "some")
    assert code == 0
    assert lines == [
        "",
        *(f"{name}: torch of {name}, Triton of {name}: 6 passed, 0 failed" for name in NAMES),
    ]
    pip = "-m pip install --quiet --upgrade"
    results = {name: clone / ".venvs" / name / "results.xml" for name in NAMES}
    pytest_of = {
        name: f"1 -m pytest -n 2 --dist loadfile --junitxml={results[name]} -k some"
        for name in NAMES
    }
    own, lifted = "[own|own.txt]", f"[{os.devnull}|]"
    package = f"--editable {clone}[dev]"
    installing = [call for call in calls if " -m pip " in call]
    assert installing == [
        f"oldest {own} 3 {pip} torch==2.10.* torchvision==0.25.* numpy<2.4 {package}",
        f"pip {own} 3 {pip} torch torchvision {package}",
        f"newest {lifted} 3 {pip} torch torchvision {package}",
    ]
    testing = [call for call in calls if " -m pytest " in call]
    assert testing == [f"{name} {own} {pytest_of[name]}" for name in NAMES]
    checking = [call for call in calls if " -m mypy " in call]
    assert checking == [f"{name} {own} 3 -m mypy emanet_triton" for name in NAMES]


def test_the_oldest_is_the_oldest_that_can_be_installed(clone):
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]
    least = [
        "{}=={}.*".format(*re.match(r"(\w+)>=([\d.]+)", requirement).groups())
        for requirement in project["dependencies"]
        if requirement.startswith(("torch>", "torchvision>"))
    ]
    _, _, calls = run(clone)
    (installing,) = (call for call in calls if call.startswith("oldest") and " -m pip " in call)
    assert len(least) == 2 and set(least) <= set(installing.split())


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("fails", "pip: torch of pip, Triton of pip: 4 passed, 2 failed"),
        ("stops", "pip: torch of pip, Triton of pip: pytest did not end"),
        ("untyped", "pip: torch of pip, Triton of pip: 6 passed, 0 failed, mypy failed"),
        (
            "offline",
            "pip: not installed: {python} -m pip install --quiet --upgrade torch torchvision "
            "--editable {clone}[dev]",
        ),
    ],
)
def test_one_that_fails_is_exit_1_and_the_others_run(clone, file, line):
    folder = clone / ".venvs" / "pip"
    (folder / file).touch()
    code, lines, _ = run(clone)
    assert code == 1
    assert lines[2] == line.format(python=folder / "bin" / "python", clone=clone)
    assert lines[3] == "newest: torch of newest, Triton of newest: 6 passed, 0 failed"


def test_an_environment_that_is_not_there_is_made(clone):
    folder = clone / ".venvs" / "pip"
    shutil.rmtree(folder)
    python = clone / ".venvs" / "oldest" / "bin" / "python"  # "makes" environments, too
    code = (
        "import runpy, sys; sys.executable = sys.argv[1]; runpy.run_path(sys.argv[2])['main']([])"
    )
    script = str(clone / "tools" / SCRIPT.name)
    command = [sys.executable, "-c", code, str(python), script]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert lines[2] == "pip: torch of pip, Triton of pip: 6 passed, 0 failed"
    calls = (folder.parent / "calls").read_text().splitlines()
    assert [call for call in calls if f"-m venv {folder}" in call]
