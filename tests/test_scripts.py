"""Every script, every command that a page or a docstring names and every target of make runs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_eval
from forks import Forks

from emanet_triton.models import entries

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BUILT = ("build", "dist", "__pycache__")

# A quick run of each: arguments, in which {name} is a path of the fixture "paths".
RUNS = {
    "emanet_triton": "--version",
    "emanet_triton eval": "--ckpt emanet_demo --data {city} --limit 1",
    "emanet_triton convert": "{weights} {new}/converted.safetensors",
    "emanet_triton train": (
        "--data {city} --train-split val --val-split val --init emanet_demo --iterations 1 "
        "--batch-size 2 --crop 32x64 --scale 64x32 --workers 1 --out {new}/trained"
    ),
    "emanet_triton bench": "em --tiny --rounds 1 --providers ours-torch",
    "emanet_triton predict": "{image} --ckpt emanet_demo --out {new}/predictions",
    "emanet_triton export": "emanet_demo --to safetensors --size 64x64 --out {new}/a.safetensors",
    "emanet_triton.deploy": "emanet_demo --to torch --part labels --size 64x96 --out {new}/a.pt2",
    "emanet_triton demo": "--port none",
    "emanet_triton env": "",
    "emanet_triton completion": "bash",
    "emanet_triton.predict": "{image} --ckpt emanet_demo --save labels --out {new}/labels",
    "emanet_triton.train": (
        "--data {city} --train-split val --val-split none --init emanet_demo --batch-size 2 "
        "--crop 32x64 --scale 64x32 --workers 0 --out {new}/dry --dry-run"
    ),
    "emanet_triton.env": "",
    "emanet_triton.completion": "zsh",
    "emanet_triton.eval": "--ckpt emanet_demo --data {city} --limit 1",
    "emanet_triton.data.scenes.generate": "{new}/scenes --count 1",
    "emanet_triton.convert": "{weights} {new}/weights.safetensors",
    "emanet_triton.bench.exports": "--tiny --to onnx --networks {r50} --csv {new}/a.csv",
    "emanet_triton.bench.training_memory": "--tiny --csv {new}/memory.csv",
    "emanet_triton.bench.large_pages": (
        "--sizes 64x64 --dtypes fp32 --processes 1 --calls 1 --csv {new}/pages.csv"
    ),
    "emanet_triton.bench.cost": "--batch 8 --positions 32768",
    "emanet_triton.bench": "em --tiny --rounds 1 --providers ours-torch",
    "emanet_triton.bench em": "--tiny --rounds 1 --providers ours-torch --csv {new}/em.csv",
    "emanet_triton.bench model": "--tiny --rounds 1 --providers plain-fp32",
    "emanet_triton.bench compare": "{results}/em_cpu.csv {results}/em_cpu.csv",
    "emanet_triton.bench report": "--check --results {results} --page {root}/docs/benchmarks.md",
    "emanet_triton.bench gpu-check": "--out {new}/gpu-check",
    "emanet_triton.bench.gpu_check.versions": "--out {new}",
    "emanet_triton.bench.gpu_check.warm": "--rehearse --tiny --processes 1 --out {new}",
    "emanet_triton.bench.gpu_check.correct": "confusion --rehearse --out {new}",
    "emanet_triton.bench.gpu_check.rehearsal": "post --device cuda --tiny --csv {new}/post.csv",
    "emanet_triton.bench.gpu_check.sweep": "--rehearse --tiny --out {new}",
    "emanet_triton.bench.gpu_check.single": "--rehearse",
    "emanet_triton.bench.gpu_check.tensorrt": "--rehearse --tiny --out {new}",
    "emanet_triton.bench.gpu_check.trace": "--rehearse --tiny --out {new}",
    "examples/serve.py": "--port none",
    "examples/load_test.py": "--seconds none",
    "demo/smoothing.py": "--scenes 1 --frames 3 --csv {new}/smoothing.csv",
    "tests.fuzz": "png --files 3",
    "tests/tiny_eval.py": "--ckpt {tiny} --data {city}",
}
# Exit code 2: there is no GPU and no TensorRT, the page of ``demo`` would stay open, and so would
# the service.
# ``make test-serve`` runs both examples.
REFUSED = {
    "emanet_triton.bench gpu-check",
    "emanet_triton demo",
    "emanet_triton.bench.gpu_check.tensorrt",
    "examples/serve.py",
    "examples/load_test.py",
}
SILENT = {"emanet_triton.data.scenes.generate", "emanet_triton.bench.gpu_check.correct"}
EXAMPLES = "tests/examples/libraries.py::test_the_loss_falls_and_the_bases_move"
# Those that another test runs: that test starts them.
ELSEWHERE = {
    "emanet_triton.bench.ahead_of_time.gates": (
        "tests/bench/test_ahead_of_time.py::test_nothing_is_compiled_under_the_interpreter"
    ),
    "emanet_triton.web": "tests/web/test_page.py::test_without_gradio",
    "demo/train.py": "tests/test_train.py::test_the_ablation_writes_nothing",
    "examples/onnx_labels.py": "tests/deploy/test_onnx_example.py::test_it_writes_the_labels",
    "examples/timm_backbone.py": EXAMPLES,
    "examples/smp_encoder.py": EXAMPLES,
    "tests/kills.py": "tests/test_kills.py::test_the_command_line",
    "tests/relaunches.py": (
        "tests/kernels/test_relaunch.py::test_triton_searches_until_there_is_a_tape"
    ),
    "tests/small_gpu.py": (
        "tests/kernels/test_launch.py::test_all_operators_run_on_a_gpu_of_little_memory"
    ),
    "tools/mmseg_env.py": (
        "tests/test_mmseg_env.py::test_each_version_is_installed_once_and_tested"
    ),
    "tools/test_versions.py": "tests/test_versions.py::test_each_is_installed_and_tested",
    "tests/bench/gpu_check_keys.py": (
        "tests/bench/test_gpu_check_warm.py::test_planned_launches_have_the_keys_of_real_ones"
    ),
}

# What make runs in a fresh clone.
INSTALL = [
    "python3 -m venv .venv",
    "python -m pip install --quiet --upgrade pip",
    "python -m pip install --quiet --editable .",
]
INSTALL_DEV = [*INSTALL, "python -m pip install --quiet --editable .[dev]"]
LINT = ["ruff check .", "ruff format --check .", "mypy emanet_triton"]
TEST = [*INSTALL_DEV, *LINT, "python -m pytest -n 2 --dist loadfile"]
TARGETS = {
    "demo": [*INSTALL, "python -m emanet_triton.eval"],
    "test": TEST,
    "test-compiled": [*INSTALL_DEV, "python -m pytest tests/bench/test_ahead_of_time.py"],
    "test-web": [
        *INSTALL_DEV,
        "python -m pip install --quiet --editable .[dev,web] playwright",
        "python -m pytest tests/web/browser.py",
    ],
    "test-examples": [
        *INSTALL_DEV,
        "python -m pip install --quiet --editable .[dev] timm segmentation-models-pytorch",
        "python -m pytest tests/examples/libraries.py",
    ],
    "test-serve": [
        *INSTALL_DEV,
        "python -m pip install --quiet --editable .[dev,serve]",
        "python -m pytest tests/serve/service.py",
    ],
    "test-cpp": [
        *INSTALL_DEV,
        "python -m pip install --quiet cmake",
        "python -m pytest tests/deploy/cpp.py",
    ],
    "test-mmseg": [*INSTALL_DEV, "python tools/mmseg_env.py"],
    "test-versions": ["python3 tools/test_versions.py"],
    "fuzz": [*INSTALL_DEV, "python -m tests.fuzz --files 5000 --seed 0"],
    "lint": [*INSTALL_DEV, *LINT],
    "gpu-check": ["python3 -m emanet_triton.bench gpu-check --stage run --out gpu-check"],
    "clean": [],
}


def visible(ending: str = "") -> Iterator[Path]:
    """Files of the repository with this end of their names, none in a hidden or built folder."""
    for folder, inner, files in os.walk(ROOT):
        inner[:] = (name for name in inner if name[0] != "." and name not in BUILT)
        yield from (Path(folder, name) for name in files if name.endswith(ending))


def is_script(path: Path) -> bool:
    """Whether a Python file does something when it is run."""
    tests = (node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return any("__name__" in ast.unparse(test) for test in tests) or path.name == "__main__.py"


def name_of(path: Path) -> str:
    """Its module, if it is run with python -m; otherwise its path."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "emanet_triton" and path.name != "__main__.py":
        return relative.as_posix()
    return ".".join(relative.with_suffix("").parts).removesuffix(".__main__")


def commands(text: str) -> set[str]:
    """Modules that a text runs with python -m, each with its subcommand if it has one.

    The console script ``emanet-triton`` runs the module ``emanet_triton``.
    """
    module = r"emanet_triton(?:\.\w+)*(?!\w|\.[\w{])"  # whole, with nothing to be filled in
    subcommand = r"(?: ([a-z][a-z-]*)(?![\w./=]))"
    found = re.findall(rf"-m\s+({module}){subcommand}?", text)
    of_script = re.findall(rf"(?:`|^ *)emanet-triton{subcommand}", text, re.MULTILINE)
    found += [("emanet_triton", name) for name in of_script]
    return {" ".join(filter(None, parts)) for parts in found}


def test_every_script_is_run():
    scripts = {name_of(path) for path in visible(".py") if is_script(path)}
    assert "demo/train.py" in scripts
    assert scripts - set(RUNS) - set(ELSEWHERE) == set()


def test_every_command_of_a_page_or_of_the_code_is_run():
    code = [path for path in visible(".py") if not path.is_relative_to(ROOT / "tests")]
    texts = [*PAGES, ROOT / "Makefile", *code]
    named = set().union(*(commands(path.read_text()) for path in texts))
    assert "emanet_triton.bench compare" in named
    assert named - set(RUNS) - set(ELSEWHERE) == set()


def test_what_counts_as_a_script_and_as_a_command(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("if __name__ == '__main__':\n    print()\n")
    assert is_script(script)
    script.write_text("print(__name__)\n")
    assert not is_script(script)
    text = "`python -m\nemanet_triton.a.b`, -m emanet_triton.c check x.csv, -m emanet_triton.d --x"
    text += " -m emanet_triton.a.{name} -m emanet_triton e -m emanet_triton"
    text += ", in emanet-triton is `emanet-triton f --x`\n    emanet-triton g h"
    named = {"emanet_triton.a.b", "emanet_triton.c check", "emanet_triton.d"}
    assert commands(text) == named | {f"emanet_triton{end}" for end in ("", " e", " f", " g")}


# A plugin of pytest: it notes which Python programs a test starts, and starts none.
NOTES = """
import os, pathlib, sys

def note(event, arguments):
    if event == "subprocess.Popen" and sys.executable in map(str, arguments[1]):
        with pathlib.Path(__file__).with_name("started").open("a") as file:
            print(os.environ["PYTEST_CURRENT_TEST"], *arguments[1], file=file)
        raise RuntimeError("not started")

sys.addaudithook(note)
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Lines of a test and of the command that it starts."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "notes.py").write_text(NOTES)
    search = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    tests = [str(ROOT / test) for test in ELSEWHERE.values()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "notes", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert (folder / "started").exists(), done.stdout + done.stderr
    return (folder / "started").read_text().splitlines()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_test_runs_it(name, started):
    own = [line.split() for line in started if line.startswith(ELSEWHERE[name])]
    assert any(word.endswith(name) for _, *command in own for word in command)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    return {
        "root": ROOT,
        "results": RESULTS,
        "r50": next(iter(entries.ZOO)),
        "weights": entries.ZOO[entries.DEMO].packaged,
        "city": tiny_eval.write_cityscapes(folder / "city", count=2),
        "image": tiny_eval.image_of(folder / "city", "leftImg8bit"),
        "tiny": tiny_eval.write_checkpoint(folder),
        "new": folder,
    }


def stamps() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in visible()}


@pytest.fixture(scope="module")
def forks(paths):
    """Scripts without a network, whose caches lie in a folder of their own."""
    own = {name: str(paths["new"]) for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME")}
    offline = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **own, **offline, "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = "0"  # as a user has it
    forks = Forks(environment)
    yield forks
    forks.close()


@pytest.mark.parametrize("name", RUNS)
def test_it_runs_and_leaves_the_repository_alone(name, paths, forks):
    module, *subcommand = name.split()
    start = [str(ROOT / module)] if module.endswith(".py") else ["-m", module]
    arguments = RUNS[name].format(**paths).split()
    before = stamps()
    done = forks.run([*start, *subcommand, *arguments], paths["new"])
    assert done.returncode == (2 if name in REFUSED else 0), done.stderr
    assert done.stdout or name in REFUSED | SILENT
    assert stamps() == before


STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
case "$*" in
    "-m venv"*) mkdir -p "$3/bin"; for tool in python ruff mypy; do cp "$0" "$3/bin/$tool"; done ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A fresh clone's Makefile, with a python3 that only notes what it is asked to do."""
    for name in ("Makefile", "pyproject.toml", ".ci/run"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
        copy.chmod(0o755)
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def calls_of(clone, *command) -> list[str]:
    """What a command asks python, ruff and mypy to do."""
    calls = clone / "calls"
    calls.write_text("")
    search = os.pathsep.join([str(clone / "bin"), os.environ["PATH"]])
    subprocess.run(command, cwd=clone, check=True, env={"PATH": search})
    return calls.read_text().splitlines()


def test_every_target_is_listed():
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"^([a-z][\w-]*):", text, re.MULTILINE)) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_make(clone, target):
    assert calls_of(clone, "make", target) == TARGETS[target]


def test_continuous_integration(clone):
    assert calls_of(clone, str(clone / ".ci" / "run")) == TEST


def test_make_installs_once_and_after_an_interruption_again(clone):
    calls_of(clone, "make", "test")
    assert calls_of(clone, "make", "test") == TEST[len(INSTALL_DEV) :]
    (clone / ".venv" / "installed").unlink()
    assert calls_of(clone, "make", "demo") == TARGETS["demo"]
    calls_of(clone, "make", "clean")
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_targets_that_exist(page):
    named = re.findall(r"(?:^    |`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert named
    assert set(named) <= set(TARGETS)
