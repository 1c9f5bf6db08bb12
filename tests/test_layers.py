"""Imports point down: bench, eval, models, kernels; and importing touches no driver."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emanet_triton

PACKAGE = Path(emanet_triton.__file__).parent
LAYERS = ("kernels", "models", "eval", "bench")  # each may import itself and what stands before it
COMMON = {"cache_folder", "command", "cores", "errors", "files", "_version"}
KERNELS_MAY_IMPORT = {"torch", "triton", "emanet_triton"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = path.relative_to(PACKAGE).parts[0]
    if layer not in LAYERS:  # the package's top and its command lines may import all layers
        return
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) | COMMON
    for name in imported(path):
        if name.startswith("emanet_triton"):
            assert name.split(".")[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if "kernels" in p.parts], ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path):
    top = {name.split(".")[0] for name in imported(path)}
    assert top - set(sys.stdlib_module_names) <= KERNELS_MAY_IMPORT


def test_an_evaluation_imports_no_large_package_that_it_may_not_need():
    """They would take half as much memory again as PyTorch does."""
    code = (
        "import sys, emanet_triton.eval.__main__;"
        "print({'torchvision', 'triton', 'torch._dynamo', 'sympy'} & set(sys.modules))"
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
        "EMAttention",
        "create_model",
        "em_attention",
        "em_attention_block",
        "list_models",
        "segment",
    } <= set(emanet_triton.__all__)
