"""``python -m emanet_triton.predict``: segment pictures, folders, videos and webcams."""

import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence

from tqdm import tqdm

from emanet_triton.command import FAILED, answer, complain, run, say
from emanet_triton.errors import InputError, first_line, one_line, printable
from emanet_triton.predict.options import parse
from emanet_triton.predict.pictures import segment_pictures
from emanet_triton.predict.plan import Plan, make_plan
from emanet_triton.predict.sources import Source
from emanet_triton.predict.video import segment_video
from emanet_triton.progress import Bar

PARTLY = 1  # the exit code if some sources could not be segmented


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1 if some sources could not be segmented; 2 for other bad input or Ctrl-C. Ctrl-C ends the
    recording of a webcam; this is no error.
    """
    return answer(lambda: _main(parse(arguments)))


def _main(args: Namespace) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(first_line(message))
        plan = make_plan(args)
        for note in plan.notes:
            _note(note)
        return _Run(plan).code()


class _Run:
    """Segments all sources of a plan, and keeps account of them.

    Args:
        plan: what to segment.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.finished = 0
        self.problems: list[str] = []

    def code(self) -> int:
        """Segment everything, print what became of it, and return the exit code."""
        plan = self.plan
        interrupted = False
        try:
            if plan.pictures:
                self._pictures()
            for video in plan.videos:
                self._video(video)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for problem in self.problems:
                complain(f"error: {one_line(problem)}")
        say(self._summary())
        if interrupted:
            complain("interrupted; the same command goes on from there")
            return FAILED
        return PARTLY if self.problems else 0

    def _pictures(self) -> None:
        plan = self.plan
        assert plan.predictor
        with Bar(total=len(plan.pictures), unit="picture", miniters=1) as bar:

            def done(source: Source, problem: str | None) -> None:
                self._count(problem)
                bar.update()

            segment_pictures(plan.pictures, plan.predictor, plan.outputs, plan.workers, done)

    def _video(self, source: Source) -> None:
        plan = self.plan
        assert plan.predictor
        with Bar(desc=one_line(source.name.name), unit="frame", miniters=1, delay=1e-3) as bar:

            def progress(count: int, total: int) -> None:
                bar.total = total or None
                bar.update(count - bar.n)

            try:
                problem = segment_video(
                    source,
                    plan.predictor,
                    plan.outputs,
                    smooth=plan.smooth,
                    most=plan.frames,
                    progress=progress,
                )
            except InputError as error:
                if isinstance(source.path, int):
                    raise
                problem = str(error)
        self._count(problem)

    def _count(self, problem: str | None) -> None:
        if problem is None:
            self.finished += 1
        else:
            self.problems.append(problem)

    def _asked(self) -> int:
        return len(self.plan.pictures) + len(self.plan.videos)

    def _summary(self) -> str:
        plan = self.plan
        parts = [f"{self.finished} of {self._asked()} segmented"]
        if plan.skipped:
            parts.append(f"{plan.skipped} finished before (--overwrite segments them again)")
        if self.problems:
            parts.append(f"{len(self.problems)} failed")
        if not self._asked():
            del parts[0]
        return f"{', '.join(parts)}: results in {plan.outputs.folder}"


def _note(line: str) -> None:
    tqdm.write(printable(f"note: {line}"), file=sys.stderr)


if __name__ == "__main__":
    run(main)
