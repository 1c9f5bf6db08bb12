"""A step: compile every kernel that the stage will launch, in many processes.

Triton keeps them in ``$TRITON_CACHE_DIR``, where the other steps find them.
"""

import functools
import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from triton.compiler import CompiledKernel

from emanet_triton.bench.gpu_check import meta, own
from emanet_triton.bench.gpu_check.families import launches
from emanet_triton.bench.gpu_check.lanes import run_lanes
from emanet_triton.bench.gpu_check.meta import Compiled, Gpu, KernelKey, Launch
from emanet_triton.bench.gpu_check.sweep import swept_launches
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.errors import describe

SILENCE = 60  # seconds: a kernel takes about one


@dataclass
class Warmed:
    """What a warm-up came to.

    Attributes:
        arch: the tile table that kernels were compiled for.
        planned: launches of kernels.
        distinct: kernels.
        hits, compiled: those that were in Triton's cache, and those that were not.
        launchers: why the host's functions that launch them could not be built, if so.
        failed: "kernel: why" of those that do not compile.
        seconds: of all.
    """

    arch: str
    planned: int = 0
    distinct: int = 0
    hits: int = 0
    compiled: int = 0
    launchers: str = ""
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def main(arguments: Sequence[str]) -> int:
    """Compile: 1 where a kernel does not, else 0."""
    made = own.parser("warm", __doc__)
    made.add_argument("--sweep", action="store_true", help="the tiles of the step sweep, too")
    own.add_processes(made)
    options = made.parse_args(arguments)
    gpu = Gpu.of_arch(options.arch) if options.rehearse else Gpu.here()
    warmed, begin = Warmed(gpu.arch), time.monotonic()
    try:
        wanted = launches(gpu, options.tiny)
        wanted += swept_launches(gpu, options.tiny) if options.sweep else []
        warm(wanted, gpu, options.processes, warmed, launchers=not options.rehearse)
    finally:  # also where time is up
        warmed.seconds = time.monotonic() - begin
        (options.out / own.WARM).write_text(json.dumps(asdict(warmed), indent=1) + "\n")
        print(json.dumps(asdict(warmed), indent=1))
    return 1 if warmed.failed else 0


def warm(
    wanted: Iterable[Launch], gpu: Gpu, processes: int, warmed: Warmed, launchers: bool = False
) -> None:
    """Compile the kernels of some launches.

    Args:
        wanted: the launches.
        gpu: what for.
        processes: how many compile at once.
        warmed: is told what comes of it.
        launchers: whether to build what the host calls, too, where Triton compiles that.
    """
    jobs = []
    for launch, keys in plan(wanted, gpu, warmed):
        jobs += [functools.partial(compile_job, launch, gpu, {key}, launchers) for key in keys]
    warmed.distinct = len(jobs)

    def done(job: functools.partial, result: object) -> None:
        ((kernel, _),) = job.args[2]
        if isinstance(result, Lost):
            warmed.failed.append(f"{kernel}: {result.reason}")
            return
        compiled, problem = result
        warmed.launchers = warmed.launchers or problem
        for one in compiled:
            warmed.hits += one.hit
            warmed.compiled += not (one.hit or one.error)
            warmed.failed += [f"{one.kernel}: {one.error}"] if one.error else []

    shared = iter(jobs)  # every process takes the next
    run_lanes([shared] * processes, processes, SILENCE, done)


def plan(
    wanted: Iterable[Launch], gpu: Gpu, warmed: Warmed
) -> list[tuple[Launch, list[KernelKey]]]:
    """The launches that need a kernel which none before needs, and these kernels."""
    seen: set[KernelKey] = set()
    found = []
    for launch in wanted:
        try:
            keys = meta.kernels_of(launch, gpu)
        except Exception as error:  # whatever a launcher raises
            warmed.failed.append(f"{launch.call}: {describe(error)}")
            continue
        warmed.planned += len(keys)
        new = [key for key in dict.fromkeys(keys) if key not in seen]
        seen.update(new)
        if new:
            found.append((launch, new))
    return found


def compile_job(
    launch: Launch, gpu: Gpu, keys: Collection[KernelKey], launchers: bool, watch: Watch
) -> tuple[list[Compiled], str]:
    """Compile some kernels of a launch in this process; what came of it, what of launchers."""
    watch.begins(str(launch.call))
    compiled, kernels = meta.compile_kernels(launch, gpu, keys)
    return compiled, _build_launchers(kernels, gpu) if launchers else ""


def _build_launchers(kernels: Iterable[CompiledKernel], gpu: Gpu) -> str:
    """Triton to 3.6 compiles a function of the host for every kernel; why it could not, if so."""
    if gpu.target.backend != "cuda":
        return ""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return ""
    try:
        for kernel in kernels:
            driver.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:  # such as a compiler that is missing
        return describe(error)
    return ""


if __name__ == "__main__":
    own.run_main(main)
