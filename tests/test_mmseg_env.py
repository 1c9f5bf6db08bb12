"""``emanet_triton.mmseg`` without mmsegmentation, and ``tools/mmseg_env.py`` without a network.

The tests inside mmsegmentation are in ``tests/in_mmseg``; ``make test-mmseg`` runs them.
"""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "mmseg_env.py"
VERSIONS = ("0.30.0", "1.2.2")

# A stand-in for every Python. pip fails where a file "offline" lies beside the environments, and
# pytest where a file "fails" does.
PYTHON = """#!/bin/sh
venvs=$(dirname "$(dirname "$(dirname "$0")")")
echo "$*" >> "$venvs/calls"
case "$*" in
    "-m venv"*) mkdir -p "$4/bin" "$4/lib/python3/site-packages/mmcv" && cp "$0" "$4/bin/python" ;;
    "-m pip"*) test ! -e "$venvs/offline" ;;
    *) test ! -e "$venvs/fails" ;;
esac
"""


@pytest.mark.parametrize("missing", ["mmseg", "mmcv"])
def test_without_mmsegmentation_one_sentence_says_so(monkeypatch, missing):
    class Finder:
        """Lets the import of mmseg fail, by itself or by a module that it imports."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "mmseg":
                raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "mmseg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "emanet_triton.mmseg", raising=False)
    with pytest.raises(ImportError) as refused:
        importlib.import_module("emanet_triton.mmseg")
    assert str(refused.value) == (
        "emanet_triton.mmseg works inside mmsegmentation 0.x or 1.x, which is not installed here: "
        f"there is no module {missing}"
    )
    assert refused.value.__suppress_context__


@pytest.fixture
def clone(tmp_path):
    """A folder with the script, a test and a Python that only notes how it is called."""
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    (tmp_path / "tests" / "in_mmseg").mkdir(parents=True)
    (tmp_path / "tests" / "in_mmseg" / "mmseg_x.py").touch()
    python = tmp_path / ".venvs" / "base" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def run(clone, *arguments):
    """Exit code, the lines of the summary, and how Python was called meanwhile."""
    calls = clone / ".venvs" / "calls"
    calls.write_text("")
    code = (
        "import runpy, sys; sys.executable = sys.argv[1];"
        "sys.exit(runpy.run_path(sys.argv[2])['main'](sys.argv[3:]))"
    )
    python, script = clone / ".venvs" / "base" / "bin" / "python", clone / "tools" / SCRIPT.name
    command = [sys.executable, "-c", code, str(python), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), calls.read_text().splitlines()


def test_each_version_is_installed_once_and_tested(clone):
    code, lines, calls = run(clone, "-k", "some")
    assert (code, lines) == (0, ["", *(f"mmsegmentation {v}: passed" for v in VERSIONS)])
    mmcv = {"0.30.0": "mmcv==1.7.2", "1.2.2": "mmcv-lite==2.1.0 mmengine"}
    testing = f"-m pytest -p no:cacheprovider {clone}/tests/in_mmseg/mmseg_x.py -k some"
    for version, of_version in zip(VERSIONS, (calls[:4], calls[4:]), strict=True):
        folder = clone / ".venvs" / f"mmseg-{version}"
        venv, small, large, test = of_version
        assert venv == f"-m venv --clear {folder}"
        assert small.startswith(
            "-m pip install --quiet --no-deps setuptools>=70.1,<81 wheel addict "
        )
        packages = f"mmsegmentation=={version} {mmcv[version]}"
        assert large == f"-m pip install --quiet --no-deps --no-build-isolation {packages}"
        assert test == testing
    assert run(clone, "-k", "some") == (0, lines, [testing, testing])


def test_the_environment_sees_the_package_and_has_no_compiled_operators(clone):
    run(clone)
    site = clone / ".venvs" / "mmseg-1.2.2" / "lib" / "python3" / "site-packages"
    shared = (site / "shared.pth").read_text().splitlines()
    assert shared[0] == str(clone) and str(Path(pytest.__file__).parents[1]) in shared
    code = "import mmcv.ops as ops; ops.point_sample(1)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert last == "RuntimeError: mmcv.ops.point_sample is not compiled in this environment"


@pytest.mark.parametrize(
    ("file", "line"), [("fails", "failed"), ("offline", "not installed: .* -m pip install .*")]
)
def test_what_fails_is_exit_1_and_both_versions_run(clone, file, line):
    (clone / ".venvs" / file).touch()
    code, lines, _ = run(clone)
    assert code == 1 and len(lines) == 3
    for version, found in zip(VERSIONS, lines[1:], strict=True):
        assert re.fullmatch(f"mmsegmentation {re.escape(version)}: {line}", found)
