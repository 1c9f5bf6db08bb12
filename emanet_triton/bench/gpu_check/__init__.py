"""``gpu-check``: everything that needs a GPU, in three stages of nine minutes each.

``run`` tests whether all runs, ``profile`` measures where the time goes, ``rows`` makes rows for
``benchmarks/results``. A stage consists of steps. Each step is a process of its own, so that a
crash or a hang ends one step only. A stage packs the files of its steps into one tar archive as it
goes, and prints a summary last. docs/gpu.md explains both.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.archive import Archive
from emanet_triton.bench.gpu_check.caches import NAME, Caches
from emanet_triton.bench.gpu_check.plan import (
    REHEARSAL_SECONDS,
    SECONDS,
    STAGES,
    Way,
    make_plan,
)
from emanet_triton.bench.gpu_check.steps import (
    GRACE,
    Outcome,
    Step,
    environment,
    run_command,
    why_absent,
)
from emanet_triton.bench.gpu_check.summary import summarise
from emanet_triton.bench.rows import PASSED
from emanet_triton.command import Parser, program
from emanet_triton.errors import InputError, describe
from emanet_triton.files import write_whole
from emanet_triton.versions import ROOT

PACK_EVERY = 60.0  # seconds after which the kernels of a running step are packed


def main(arguments: Sequence[str]) -> int:
    """Run a stage. Returns 1 if a step failed, else 0.

    Raises:
        InputError: bad arguments, no GPU, or a bad folder or cache.
        KeyboardInterrupt: by Ctrl-C; the results so far are in the files.
    """
    options = make_parser().parse_args(arguments)
    if not options.rehearse:
        own.check_gpu("gpu-check")
    way = Way(options.rehearse, options.tiny, options.arch, options.processes)
    title = f"gpu-check --stage {options.stage}"
    title += f", {own.REHEARSAL}" if options.rehearse else ""
    steps = make_plan(options.stage, way)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        stage = Stage(title, Path(work), options.out, options.stage, options.triton_cache)
        return stage.run(steps, 2 * REHEARSAL_SECONDS if options.rehearse else SECONDS)


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("bench gpu-check"),
        description="Do all that needs a GPU, in stages of nine minutes each; docs/gpu.md explains "
        "them.",
    )
    parser.add_argument(
        "--stage",
        choices=list(STAGES),
        default="run",
        help="run: whether all runs; profile: where the time goes; rows: the rows of "
        "benchmarks/results; default: %(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        metavar="DIR",
        help="the folder to write; default: %(default)s",
    )
    parser.add_argument(
        "--triton-cache",
        type=Path,
        metavar="PATH",
        help="compiled kernels: a cache folder of Triton, or the tar of an earlier stage or "
        "rehearsal",
    )
    own.add_rehearsal(parser)
    own.add_processes(parser)
    return parser


class Stage:
    """The steps of a stage, and the archive and summary of their results.

    Args:
        title: first line of the summary.
        work: an empty folder for the files of the steps.
        out: the folder of the archive and of the summary.
        name: of the stage.
        given: compiled kernels, as ``Caches.fill`` takes them.

    Raises:
        InputError: ``out`` cannot be written or has files of this stage, or there are no kernels
            in ``given``.
    """

    def __init__(
        self, title: str, work: Path, out: Path, name: str, given: Path | None = None
    ) -> None:
        self.title, self.given = title, given
        self.caches = Caches(work / "caches")
        self.caches.fill(given)
        self.carried = self.caches.count()
        self.archive = Archive(out / f"gpu-check-{name}.tar", work / "steps")
        self.archive.folder.mkdir()
        self.summary = out / f"summary-{name}.txt"
        self.outcomes: list[Outcome] = []
        self._packed = 0, 0  # state of the caches
        self._begin = self._packed_at = time.monotonic()
        own.make_folder(out)
        if self.summary.exists() or self.archive.path.exists():
            raise InputError(
                f"--out {out}: holds files of a stage {name} already; give another folder"
            )
        try:
            self.summary.touch()
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None

    def run(self, steps: Sequence[Step], seconds: float, grace: float = GRACE) -> int:
        """Run steps in order, then print the summary. Returns 1 if a step failed, else 0.

        Args:
            steps: what to run.
            seconds: limit for all steps together.
            grace: seconds between asking a step to end and killing it.
        """
        end = time.monotonic() + seconds
        try:
            for number, step in enumerate(steps):
                left = end - time.monotonic() - grace
                spare = left - sum(later.seconds for later in steps[number:])
                self._run(step, number, min(left, step.seconds + max(0.0, spare)), grace)
                self._finished()
                with contextlib.suppress(OSError):  # the terminal may have gone
                    said = f"{step.name}: {self.outcomes[-1].result}"
                    print(said, file=sys.stderr, flush=True)
        finally:
            text = self._finished()
            with contextlib.suppress(OSError):
                print(text, flush=True)
        return 1 if any(outcome.failed for outcome in self.outcomes) else 0

    def _run(self, step: Step, number: int, limit: float, grace: float) -> None:
        """Add the outcome of a step.

        Raises:
            KeyboardInterrupt: by Ctrl-C, after the step has ended and its outcome is added.
        """
        folder = self.archive.folder / f"{number:02}-{step.name}"
        if absent := why_absent(step):
            self.outcomes.append(Outcome(step, folder, f"absent: {absent}"))
            return
        if limit <= 0:
            self.outcomes.append(Outcome(step, folder, "not started: no time left"))
            return
        folder.mkdir()
        before, begin, result = self.caches.count(), time.monotonic(), "interrupted"
        variables = environment(ROOT, self.caches.triton, self.caches.package)
        try:
            result = run_command(step.command, folder, variables, limit, grace, self._keep)
        finally:
            took, compiled = time.monotonic() - begin, self.caches.count() - before
            self.outcomes.append(Outcome(step, folder, result, took, compiled))

    def _keep(self) -> None:
        """Keep the files that a running step has written so far."""
        if time.monotonic() - self._packed_at >= PACK_EVERY:
            self._pack()
        self.archive.update()

    def _finished(self) -> str:
        """Keep all files, and write and return the summary so far."""
        self._pack()
        self.archive.update()
        text = self._text()
        with contextlib.suppress(OSError):  # the run is worth more than its files
            for folder in (self.archive.folder, self.summary.parent):
                write_whole(folder / self.summary.name, f"{text}\n".encode())
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

    def _text(self) -> str:
        passed = sum(outcome.result == PASSED for outcome in self.outcomes)
        failed = sum(outcome.failed for outcome in self.outcomes)
        others = {"absent": len(self.outcomes) - passed - failed, "failed": failed}
        counts = [f"{passed} passed", *(f"{n} {name}" for name, n in others.items() if n)]
        title = f"{self.title}: {', '.join(counts)}, {time.monotonic() - self._begin:.0f} s"
        try:
            return summarise(title, self.outcomes, self._notes())
        except Exception as error:  # a file that is cut off or of another form
            results = (f"{outcome.step.name}: {outcome.result}" for outcome in self.outcomes)
            return "\n".join([title, f"no summary: {describe(error)}", *results])

    def _notes(self) -> list[str]:
        """Lines of the summary about the archive and the caches."""
        notes = [self.archive.problem]
        if self.archive.left_out:
            notes.append(f"left out of the tar: {', '.join(self.archive.left_out)}")
        if self.given:
            notes.append(f"kernels carried: {self.carried}")
            warmed = [own.read_json(outcome.folder / own.WARM) for outcome in self.outcomes]
            if any(each and each["distinct"] and not each["hits"] for each in warmed):
                notes.append(
                    "no carried kernel was used: another Triton, Python, GPU or kernel source"
                )
        return notes
