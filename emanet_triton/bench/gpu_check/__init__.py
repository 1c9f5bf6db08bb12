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

import torch

from emanet_triton.bench.gpu_check.archive import Archive
from emanet_triton.bench.gpu_check.caches import NAME, Caches
from emanet_triton.bench.gpu_check.own import REHEARSAL, WARM, add_processes, read_json
from emanet_triton.bench.gpu_check.plan import (
    REHEARSAL_SECONDS,
    ROOT,
    SECONDS,
    STAGES,
    Way,
    make_plan,
)
from emanet_triton.bench.gpu_check.steps import GRACE, Outcome, Runner, Step, environment
from emanet_triton.bench.gpu_check.summary import summarise
from emanet_triton.bench.measure import describe
from emanet_triton.bench.options import Parser
from emanet_triton.bench.rows import PASSED
from emanet_triton.errors import InputError
from emanet_triton.files import write_whole
from emanet_triton.kernels.tiles import ARCHS

SUMMARY = "summary.txt"


def main(arguments: Sequence[str]) -> int:
    """Run a stage: 0, 1 where a step failed, 2 for bad input.

    Raises:
        InputError: bad arguments, no GPU, or a folder or a cache that is not as it should be.
    """
    options = _options(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        raise InputError(
            "gpu-check needs a GPU, and PyTorch finds none here; --rehearse does without"
        )
    way = Way(options.rehearse, options.tiny, options.arch, options.processes)
    title = f"gpu-check --stage {options.stage}"
    title += f", {REHEARSAL}" if options.rehearse else ""
    steps = make_plan(options.stage, way)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        name = f"gpu-check-{options.stage}.tar"
        stage = Stage(title, Path(work), options.out, name, options.triton_cache)
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
        name: of the archive.
        given: what ``Caches.fill`` takes.

    Raises:
        InputError: the folder cannot be written, or there are no kernels in ``given``.
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
        self.archive = Archive(self.out / self.name, files)
        self._packed = 0
        self._begin = time.monotonic()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(self.out / SUMMARY, b"")
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written: {error.strerror}") from None

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
            keep=self.archive.update,
            finished=self._finished,
            seconds=seconds,
            grace=grace,
        )
        try:
            runner.run(steps)
        finally:
            self._finished(runner.outcomes)
            print(self._summary(runner.outcomes))
        return 1 if any(outcome.failed for outcome in runner.outcomes) else 0

    def _finished(self, outcomes: Sequence[Outcome]) -> None:
        """Keep all that there is after a step."""
        count = self.caches.count()
        with contextlib.suppress(OSError):  # the run is worth more than its files
            if count != self._packed:
                self.caches.pack(self.archive.folder / NAME)
                self._packed = count
            self.archive.update()
            write_whole(self.out / SUMMARY, f"{self._summary(outcomes)}\n".encode())

    def _summary(self, outcomes: Sequence[Outcome]) -> str:
        passed = sum(outcome.result == PASSED for outcome in outcomes)
        took = time.monotonic() - self._begin
        title = f"{self.title}: {passed} of {len(outcomes)} steps passed, {took:.0f} s"
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
                    "none of them was a hit: they are of another Triton or Python, or of other "
                    "kernels"
                )
        return notes


def all_missed(outcomes: Sequence[Outcome]) -> bool:
    """Whether the warm-up found nothing in the cache."""
    warmed = [read_json(outcome.folder / WARM) for outcome in outcomes]
    return any(each and each["distinct"] and not each["hits"] for each in warmed)
