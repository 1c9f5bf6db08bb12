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
    "emanet_triton.eval.graphs": "emanet_triton.inference.graphs",
    "emanet_triton.eval.heap": "emanet_triton.heap",
    "emanet_triton.eval.inputs": "emanet_triton.inference.inputs",
    "emanet_triton.eval.jobs": "emanet_triton.eval.plan",
    "emanet_triton.eval.png": "emanet_triton.data.png",
    "emanet_triton.eval.png_chunks": "emanet_triton.data.png_chunks",
    "emanet_triton.eval.png_rows": "emanet_triton.data.png_rows",
    "emanet_triton.eval.reference": "emanet_triton.inference.reference",
    "emanet_triton.eval.scene_canvas": "emanet_triton.data.scenes.canvas",
    "emanet_triton.eval.scene_objects": "emanet_triton.data.scenes.objects",
    "emanet_triton.eval.scenes": "emanet_triton.data.scenes.generate",
    "emanet_triton.eval.segment_arguments": "emanet_triton.inference.segment",
    "emanet_triton.eval.taps": "emanet_triton.inference.taps",
    "emanet_triton.eval.views": "emanet_triton.inference.views",
    "emanet_triton.eval.workers": "emanet_triton.workers",
    "emanet_triton.kernels.compiled": "emanet_triton.bench.ahead_of_time.gates",
    "emanet_triton.kernels.compiled_code": "emanet_triton.bench.ahead_of_time.code",
    "emanet_triton.kernels.compiled_launches": "emanet_triton.bench.ahead_of_time.launches",
    "emanet_triton.kernels.conv.choice": "emanet_triton.kernels.choice",
    "emanet_triton.kernels.conv_choice": "emanet_triton.kernels.choice",
    "emanet_triton.kernels.conv_cost": "emanet_triton.bench.cost",
    "emanet_triton.kernels.conv_cpu": "emanet_triton.kernels.conv.onednn",
    "emanet_triton.kernels.conv_exact": "emanet_triton.kernels.conv.exact",
    "emanet_triton.kernels.conv_providers": "emanet_triton.kernels.conv.eager",
    "emanet_triton.kernels.conv_tiles": "emanet_triton.kernels.conv.tiles",
    "emanet_triton.kernels.conv_triton": "emanet_triton.kernels.conv.implicit_gemm",
    "emanet_triton.kernels.cost": "emanet_triton.bench.cost",
    "emanet_triton.kernels.em_attention": "emanet_triton.kernels.em.attention",
    "emanet_triton.kernels.em_block": "emanet_triton.kernels.em.block",
    "emanet_triton.kernels.em_torch": "emanet_triton.kernels.em.eager",
    "emanet_triton.kernels.ops": "emanet_triton.kernels.em.op",
    "emanet_triton.kernels.reference": "emanet_triton.kernels.em.reference",
    "emanet_triton.kernels.resample_torch": "emanet_triton.kernels.resample.eager",
    "emanet_triton.kernels.resample_triton": "emanet_triton.kernels.resample.gather",
    "emanet_triton.kernels.tiles": "emanet_triton.kernels.em.tiles",
    "emanet_triton.kernels.winograd": "emanet_triton.kernels.conv.winograd",
    "emanet_triton.models.agreement": "emanet_triton.models.trial",
    "emanet_triton.models.trial_child": "emanet_triton.models.trial",
}


class OldPaths(MetaPathFinder, Loader):
    """Finds a moved module under its old name. Both names give the same module object."""

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
