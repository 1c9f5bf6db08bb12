"""``python -m emanet_triton.eval``: from a checkpoint and a data set to the table."""

import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from emanet_triton.command import FAILED, answer, complain, program, run, say
from emanet_triton.errors import InputError, first_line, printable
from emanet_triton.eval import report
from emanet_triton.eval.finite import check_network
from emanet_triton.eval.listing import models_table, notes, sources_table
from emanet_triton.eval.options import parse
from emanet_triton.eval.partial import PartialResult
from emanet_triton.eval.plan import Job, Plan, make_plan
from emanet_triton.eval.ranks import Ranks, ranks
from emanet_triton.eval.runner import evaluate
from emanet_triton.models.zoo import list_models

DEMONSTRATION = """
This was a demonstration: a small model, trained and evaluated on generated street scenes. Its
figures say nothing about Cityscapes. For a published model (the file is downloaded once):
  {program} --data CITYSCAPES_ROOT \\
    --ckpt emanet_r50-d8_512x1024_80k_cityscapes"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _answered(parse(arguments)))


def _answered(args: Namespace) -> int:
    """List the models, or evaluate."""
    if args.list:
        names = list_models(dataset=args.dataset, source=args.all)
        parts = models_table(names), notes(names), sources_table(names)
        say("\n\n".join(filter(None, parts)))
        return 0
    return _joined(args)


def _joined(args: Namespace) -> int:
    """Join the other processes of a torchrun, and evaluate."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(f"note: {first_line(message)}")
        with ranks(_note) as group:
            return _main(args, group)


def _main(args: Namespace, group: Ranks) -> int:
    interrupted = "interrupted before the first image"
    try:
        plan = make_plan(args, group)
        interrupted = "interrupted"
        _run(plan, group)
    except InputError as error:
        where = "" if group.first else f" on rank {group.rank}"
        return _fail(group.fail(f"error{where}: {error}"))
    except KeyboardInterrupt:
        return _fail(group.fail(interrupted))
    return 0


def _run(plan: Plan, group: Ranks) -> None:
    torch.set_num_threads(plan.threads)
    partials = [plan.partial(job, group.rank) for job in plan.jobs]
    pairs = zip(plan.jobs, partials, strict=True)
    reports = [_evaluate(plan, job, partial, group) for job, partial in pairs]
    if group.first:
        try:
            if plan.json:
                report.write_json(plan.json, reports, as_list=plan.all)
        finally:  # afterwards, because the terminal may be gone
            _print(plan, reports)
    group.barrier()
    for partial in partials:  # not earlier: the results are safe only now
        partial.discard()


def _evaluate(plan: Plan, job: Job, partial: PartialResult, group: Ranks) -> report.Report:
    tell: Callable[[str], None] = _note if group.first else _silent
    tell(report.title(plan, job))
    predictor = plan.predictor(job, plan.precision)
    other = plan.predictor(job, plan.compare) if plan.compare else None
    tell(report.running(plan, predictor))
    image = plan.dataset.read_image(plan.samples[0].image)
    for each in filter(None, (predictor, other)):
        check_network(each, image)
    result = evaluate(
        predictor,
        plan.samples,
        partial,
        outputs=plan.outputs_of(job),
        ranks=group,
        workers=plan.workers,
        resume=plan.resume,
        say=tell,
        other=other,
    )
    tell(report.speed(result, len(plan.samples)))
    return report.make_report(plan, job, predictor, result)


def _print(plan: Plan, reports: list[report.Report]) -> None:
    if not plan.all:
        say(f"{report.class_table(reports[0].classes, reports[0].scores())}\n")
    say(report.summary_table(reports))
    if plan.compare:
        say(f"\n{report.comparison_table(reports)}")
    if plan.demo:
        say(DEMONSTRATION.format(program=program("eval")))


def _note(line: str) -> None:
    tqdm.write(printable(line), file=sys.stderr)


def _silent(line: str) -> None:
    pass


def _fail(message: str) -> int:
    if message:
        complain(message)
    return FAILED


if __name__ == "__main__":
    run(main)
