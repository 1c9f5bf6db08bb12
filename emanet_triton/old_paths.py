"""The old paths of modules that have moved, for code that still imports them.

``emanet_triton.eval.inference`` became two modules, so it has a file that imports from both.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
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


class OldPaths(MetaPathFinder, Loader):
    """Finds a moved module under its old name; it stays one module, with its new name."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        origin = _new_spec(fullname).origin  # ``python -m`` shows it
        return ModuleSpec(fullname, self, origin=origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__  # the import system is about to replace it
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        module.__spec__ = spec.loader_state if spec else None

    def get_code(self, name: str) -> CodeType | None:
        """The code that ``python -m`` runs for an old name."""
        loader = _new_spec(name).loader
        return loader.get_code(MOVED[name]) if isinstance(loader, InspectLoader) else None


def _new_spec(old: str) -> ModuleSpec:
    spec = importlib.util.find_spec(MOVED[old])
    if spec is None:
        raise ModuleNotFoundError(f"No module named {MOVED[old]!r}", name=MOVED[old])
    return spec


def install() -> None:
    """Make the old paths importable, once."""
    if not any(type(finder).__name__ == OldPaths.__name__ for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
