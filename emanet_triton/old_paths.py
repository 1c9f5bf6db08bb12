"""Modules under the paths that they had before they moved, for code that still imports those.

``emanet_triton.eval.inference`` became two modules, so it has a file that imports from both.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import CodeType, ModuleType

MOVED = {
    "emanet_triton.eval.cityscapes": "emanet_triton.data.cityscapes",
    "emanet_triton.eval.jobs": "emanet_triton.eval.plan",
    "emanet_triton.eval.png": "emanet_triton.data.png",
    "emanet_triton.eval.scenes": "emanet_triton.data.scenes.generate",
    "emanet_triton.kernels.compiled": "emanet_triton.bench.ahead_of_time.gates",
    "emanet_triton.kernels.cost": "emanet_triton.bench.cost",
    "emanet_triton.kernels.ops": "emanet_triton.kernels.em.op",
    "emanet_triton.kernels.reference": "emanet_triton.kernels.em.reference",
}


class OldPaths(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a moved module under its old name; it stays one module, with its new name."""

    def find_spec(self, name, path=None, target=None):
        if name not in MOVED:
            return None
        origin = importlib.util.find_spec(MOVED[name]).origin  # ``python -m`` shows it
        return importlib.machinery.ModuleSpec(name, self, origin=origin)

    def create_module(self, spec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__  # the import system is about to replace it
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> CodeType:
        """For ``python -m`` with an old name."""
        loader = importlib.util.find_spec(MOVED[name]).loader
        return loader.get_code(MOVED[name])


def install() -> None:
    """Make the old paths importable, once."""
    if not any(type(finder).__name__ == OldPaths.__name__ for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
