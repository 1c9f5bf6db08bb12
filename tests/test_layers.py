"""Imports point down, never sideways or in circles; and importing touches no driver."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import emanet_triton
from emanet_triton.old_paths import MOVED

PACKAGE = Path(emanet_triton.__file__).parent
# Each room may import itself and the rooms of earlier lines.
FLOORS = (
    ("kernels", "data"),
    ("models",),
    ("inference",),
    ("deploy", "eval", "mmseg", "predict", "web"),
    ("train",),
    ("bench",),
)
# Packages that import no sibling.
OPERATORS = ("kernels.em", "kernels.conv", "kernels.pool", "kernels.resample")
COMMON = {
    "_version",
    "cache_folder",
    "command",
    "cores",
    "errors",
    "files",
    "heap",
    "progress",
    "subcommands",
    "versions",
    "workers",
}
KERNELS_MAY_IMPORT = {"torch", "triton", "emanet_triton"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module in a file, without the name of the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> set[str]:
    """Full names of all that the imports below a node name: modules, and names in them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported(path: Path) -> set[str]:
    return imports(ast.parse(path.read_text()))


def rooms_below(room: str) -> set[str]:
    floor = next(i for i, rooms in enumerate(FLOORS) if room in rooms)
    return {room, *(below for rooms in FLOORS[:floor] for below in rooms)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    room = name_of(path).partition(".")[0]
    if not any(room in rooms for rooms in FLOORS):  # the package's top may import all rooms
        return
    for name in imported(path):
        if name.startswith("emanet_triton"):
            assert name.split(".")[1] in rooms_below(room) | COMMON, f"{path} imports {name}"


@pytest.mark.parametrize("package", OPERATORS)
def test_operators_import_no_other_operators(package):
    others = tuple(f"emanet_triton.{other}." for other in OPERATORS if other != package)
    for path in (PACKAGE / package.replace(".", "/")).glob("*.py"):
        assert [name for name in imported(path) if name.startswith(others)] == []


def test_no_module_imports_itself_through_others():
    modules = {name_of(path): path for path in MODULES}
    graph = {
        name: {
            known
            for full in imported(path)
            for inner in [full.removeprefix("emanet_triton.")]
            for known in [inner if inner in modules else inner.rpartition(".")[0]]
            if full.startswith("emanet_triton.") and known in modules
        }
        for name, path in modules.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' imports '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize(
    "path", [p for p in MODULES if name_of(p).startswith("kernels.")], ids=name_of
)
def test_kernels_import_torch_and_triton_only(path):
    top = {name.split(".")[0] for name in imported(path)}
    assert top - set(sys.stdlib_module_names) <= KERNELS_MAY_IMPORT


def test_an_evaluation_imports_no_large_package_that_it_may_not_need():
    """They would take half as much memory again as PyTorch does."""
    code = (
        "import sys, emanet_triton.eval.__main__ as _;"
        "from emanet_triton import create_model, fuse;"
        "fuse(create_model('emanet_demo', pretrained=True));"
        "large = {'torchvision', 'triton', 'torch._dynamo', 'sympy', 'huggingface_hub'};"
        "print(large & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_importing_the_package_touches_no_driver():
    code = "import emanet_triton, torch; assert not torch.cuda.is_initialized()"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=hidden)


def test_public_names():
    for name in emanet_triton.__all__:
        assert getattr(emanet_triton, name) is not None
    assert {
        "EMAHead",
        "EMAUnit",
        "EMAttention",
        "create_model",
        "em_attention",
        "em_attention_block",
        "list_models",
        "segment",
    } <= set(emanet_triton.__all__)


@pytest.mark.parametrize("old", MOVED)
def test_old_paths_name_the_same_modules(old):
    module = importlib.import_module(old)
    assert module is importlib.import_module(MOVED[old])
    assert module.__name__ == module.__spec__.name == MOVED[old]


def test_operators_under_their_old_paths():
    for package, name in (("conv", "conv_bias_act"), ("resample", "resample_labels")):
        old = importlib.import_module(f"emanet_triton.kernels.{package}")
        new = importlib.import_module(f"emanet_triton.kernels.{package}.op")
        assert getattr(old, name) is getattr(new, name)
        assert not hasattr(old, "no_such_name")


def test_segment_under_its_old_path():
    assert importlib.import_module("emanet_triton.eval.inference").segment is emanet_triton.segment


def test_an_old_path_as_a_command(tmp_path):
    command = [sys.executable, "-m", "emanet_triton.eval.scenes", str(tmp_path), "--count", "1"]
    subprocess.run(command, check=True)
    assert len(list(tmp_path.rglob("*_leftImg8bit.png"))) == 1
