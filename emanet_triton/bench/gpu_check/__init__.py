"""``gpu-check``: everything that needs a GPU, in three stages of nine minutes each.

``run`` says whether all runs, ``profile`` where the time goes, ``rows`` makes rows for
``benchmarks/results``. Each step is a process of its own: what crashes or hangs ends alone. Their
files are packed into one tar as the run goes; a summary is printed last. docs/gpu.md says how to
read it.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emanet_triton.bench.gpu_check.archive import Archive
from emanet_triton.bench.gpu_check.caches import NAME, Caches
from emanet_triton.bench.gpu_check.own import (
    REHEARSAL,
    WARM,
    add_processes,
    check_gpu,
    make_folder,
    read_json,
)
from emanet_triton.bench.gpu_check.plan import (
    REHEARSAL_SECONDS,
    SECONDS,
    STAGES,
    Way,
    make_plan,
)
from emanet_triton.bench.gpu_check.steps import GRACE, Outcome, Runner, Step, environment
from emanet_triton.bench.gpu_check.summary import summarise
from emanet_triton.bench.machine import ROOT
from emanet_triton.bench.rows import PASSED
from emanet_triton.command import Parser
from emanet_triton.errors import InputError, describe
from emanet_triton.files import write_whole
from emanet_triton.kernels.tile import ARCHS

PACK_EVERY = 60.0  # seconds after which the kernels of a running step are packed


def main(arguments: Sequence[str]) -> int:
    """Run a stage: 0, 1 where a step failed, 2 for bad input.

    Raises:
        InputError: bad arguments, no GPU, or a folder or a cache that is not as it should be.
        KeyboardInterrupt: by Ctrl-C; the files hold what there was.
    """
    options = _options(arguments)
    if not options.rehearse:
        check_gpu("gpu-check")
    way = Way(options.rehearse, options.tiny, options.arch, options.processes)
    title = f"gpu-check --stage {options.stage}"
    title += f", {REHEARSAL}" if options.rehearse else ""
    steps = make_plan(options.stage, way)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        stage = Stage(title, Path(work), options.out, options.stage, options.triton_cache)
        return stage.run(steps, 2 * REHEARSAL_SECONDS if options.rehearse else SECONDS)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m emanet_triton.bench gpu-check", description=__doc__)
    parser.add_argument("--stage", choices=list(STAGES), default="run")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR")
    parser.add_argument(
        "--triton-cache",
        type=Path,
        metavar="PATH",
        help="compiled kernels: a folder of Triton's, or the tar of an earlier stage or rehearsal",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: compiles, packs, measures nothing"
    )
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="of a rehearsal's kernels")
    parser.add_argument("--tiny", action="store_true", help="little of everything: whether it runs")
    add_processes(parser)
    return parser.parse_args(arguments)


@dataclass
class Stage:
    """The steps of a stage on their way into an archive.

    Attributes:
        title: first line of the summary.
        work: an empty folder, for what the steps write.
        out: the folder of the archive and of the summary.
        name: of the stage.
        given: what ``Caches.fill`` takes.

    Raises:
        InputError: ``out`` cannot be written or has files of this stage, or there are no kernels
            in ``given``.
    """

    title: str
    work: Path
    out: Path
    name: str
    given: Path | None = None
    carried: int = field(init=False)
    caches: Caches = field(init=False)
    archive: Archive = field(init=False)

    def __post_init__(self) -> None:
        files = self.work / "steps"
        files.mkdir()
        self.caches = Caches(self.work / "caches")
        self.caches.fill(self.given)
        self.carried = self.caches.count()
        self.archive = Archive(self.out / f"gpu-check-{self.name}.tar", files)
        self._summary_name = f"summary-{self.name}.txt"
        self._packed = 0, 0
        self._begin = self._packed_at = time.monotonic()
        self._claim()

    def _claim(self) -> None:
        """Make the folder and the summary, which nobody may have made before."""
        make_folder(self.out)
        try:
            if self.archive.path.exists():
                raise FileExistsError
            (self.out / self._summary_name).open("x").close()
        except FileExistsError:
            raise InputError(
                f"--out {self.out}: holds files of a stage {self.name} already; give another folder"
            ) from None
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot be written ({error.strerror})") from None

    def run(self, steps: Sequence[Step], seconds: float, grace: float = GRACE) -> int:
        """Run the steps, then print the summary: 1 where one failed, else 0.

        Args:
            steps: in their order.
            seconds: of all of them.
            grace: between asking a step to end and ending it.
        """
        runner = Runner(
            work=self.archive.folder,
            environment=environment(ROOT, self.caches.triton, self.caches.package),
            count=self.caches.count,
            keep=self._keep,
            finished=self._finished,
            seconds=seconds,
            grace=grace,
        )
        try:
            runner.run(steps)
        finally:
            text = self._finished(runner.outcomes)
            with contextlib.suppress(OSError):  # the terminal may have gone
                print(text, flush=True)
        return 1 if any(outcome.failed for outcome in runner.outcomes) else 0

    def _keep(self) -> None:
        """Keep what a running step has written so far."""
        if time.monotonic() - self._packed_at >= PACK_EVERY:
            self._pack()
        self.archive.update()

    def _finished(self, outcomes: Sequence[Outcome]) -> str:
        """Keep all that there is after a step; the summary so far."""
        self._pack()
        self.archive.update()
        text = self._summary(outcomes)
        with contextlib.suppress(OSError):  # the run is worth more than its files
            for folder in (self.archive.folder, self.out):
                write_whole(folder / self._summary_name, f"{text}\n".encode())
        self.archive.update()
        return text

    def _pack(self) -> None:
        """Pack the compiled kernels, if there are new ones."""
        with contextlib.suppress(OSError):  # a step has just removed one, or the disk is full
            state = self.caches.state()
            if state != self._packed:
                self.caches.pack(self.archive.folder / NAME)
                self._packed = state
        self._packed_at = time.monotonic()

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        took = time.monotonic() - self._begin
        title = f"{self.title}: {_counts(outcomes)}, {took:.0f} s"
        try:
            return summarise(title, outcomes, self._notes(outcomes))
        except Exception as error:  # half a file, of whatever form
            results = (f"{outcome.step.name}: {outcome.result}" for outcome in outcomes)
            return "\n".join([title, f"no summary: {describe(error)}", *results])

    def _notes(self, outcomes: Sequence[Outcome]) -> list[str]:
        """What there is to say about the caches and the archive."""
        notes = [self.archive.problem]
        if self.archive.left_out:
            notes.append(f"left out of the tar: {', '.join(self.archive.left_out)}")
        if self.given:
            made = self.caches.made_with()
            notes.append(
                f"kernels carried: {self.carried}" + (f", made with {made}" if made else "")
            )
            if all_missed(outcomes):
                notes.append(
                    "no carried kernel was used: another Triton, Python, GPU or kernel source"
                )
        return notes


def _counts(outcomes: Sequence[Outcome]) -> str:
    """How many steps passed, were absent and failed."""
    passed = sum(outcome.result == PASSED for outcome in outcomes)
    failed = sum(outcome.failed for outcome in outcomes)
    others = {"absent": len(outcomes) - passed - failed, "failed": failed}
    return ", ".join([f"{passed} passed", *(f"{n} {name}" for name, n in others.items() if n)])


def all_missed(outcomes: Sequence[Outcome]) -> bool:
    """Whether the warm-up found nothing in the cache."""
    warmed = [read_json(outcome.folder / WARM) for outcome in outcomes]
    return any(each and each["distinct"] and not each["hits"] for each in warmed)
