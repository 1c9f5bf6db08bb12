"""A step: compile every kernel that the stage will launch, in many processes.

Triton keeps the kernels in ``$TRITON_CACHE_DIR``, where the other steps find them.
"""

import functools
import json
import time
from collections.abc import Iterable, Sequence
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

Job = functools.partial[tuple[list[Compiled], str]]


@dataclass
class Warmed:
    """The result of a warm-up.

    Attributes:
        arch: the tile table that kernels were compiled for.
        planned: how many launches of kernels there will be.
        distinct: how many kernels these launches need.
        hits, compiled: how many kernels were in Triton's cache, and how many were not.
        launchers: why the host's functions that launch kernels could not be built; empty if they
            were.
        failed: "kernel: why" for each kernel that does not compile.
        seconds: duration of the warm-up.
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
    """Compile. Returns 1 if a kernel does not compile, else 0."""
    parser = own.StepParser("warm", __doc__)
    parser.add_argument("--sweep", action="store_true", help="the tiles of the step sweep, too")
    own.add_processes(parser)
    options = parser.parse(arguments)
    gpu = Gpu.of_arch(options.arch) if options.rehearse else Gpu.here()
    warmed, begin = Warmed(gpu.arch), time.monotonic()
    try:
        wanted = launches(gpu, options.tiny)
        wanted += swept_launches(gpu, options.tiny) if options.sweep else []
        warm(wanted, gpu, options.processes, warmed, launchers=not options.rehearse)
    finally:  # also where time is up
        warmed.seconds = time.monotonic() - begin
        text = json.dumps(asdict(warmed), indent=1)
        (options.out / own.WARM).write_text(f"{text}\n")
        print(text)
    return 1 if warmed.failed else 0


def warm(
    wanted: Iterable[Launch], gpu: Gpu, processes: int, warmed: Warmed, launchers: bool = False
) -> None:
    """Compile the kernels of some launches.

    Args:
        wanted: the launches.
        gpu: what the kernels are compiled for.
        processes: how many compile at once.
        warmed: gets the results.
        launchers: whether to build the host's functions that launch kernels, too, where this
            version of Triton compiles them.
    """
    jobs: list[Job] = [
        functools.partial(compile_job, launch, gpu, key, launchers)
        for launch, key in plan(wanted, gpu, warmed)
    ]
    warmed.distinct = len(jobs)

    def done(job: Job, result: tuple[list[Compiled], str] | Lost) -> None:
        if isinstance(result, Lost):
            _, _, key, _ = job.args
            warmed.failed.append(f"{key.name}: {result.reason}")
            return
        compiled, problem = result
        warmed.launchers = warmed.launchers or problem
        for one in compiled:
            warmed.hits += one.hit
            warmed.compiled += not (one.hit or one.error)
            warmed.failed += [f"{one.kernel}: {one.error}"] if one.error else []

    shared = iter(jobs)  # every process takes the next
    run_lanes([shared] * processes, processes, SILENCE, done)


def plan(wanted: Iterable[Launch], gpu: Gpu, warmed: Warmed) -> list[tuple[Launch, KernelKey]]:
    """Each kernel that some launches need, with the first launch that needs it."""
    found: dict[KernelKey, Launch] = {}
    for launch in wanted:
        try:
            keys = meta.kernels_of(launch, gpu)
        except Exception as error:  # whatever a launcher raises
            warmed.failed.append(f"{launch.call}: {describe(error)}")
            continue
        warmed.planned += len(keys)
        for key in keys:
            found.setdefault(key, launch)
    return [(launch, key) for key, launch in found.items()]


def compile_job(
    launch: Launch, gpu: Gpu, key: KernelKey, launchers: bool, watch: Watch
) -> tuple[list[Compiled], str]:
    """Compile a kernel of a launch in this process. Also returns why a launcher was not built."""
    watch.begins(str(launch.call))
    compiled, kernels = meta.compile_kernels(launch, gpu, {key})
    return compiled, _build_launchers(kernels, gpu) if launchers else ""


def _build_launchers(kernels: Iterable[CompiledKernel], gpu: Gpu) -> str:
    """Build the function of the host that launches each kernel, which Triton up to 3.6 compiles.

    Returns why one could not be built; empty if all were.
    """
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
