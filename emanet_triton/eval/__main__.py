"""``python -m emanet_triton.eval``: from a checkpoint and a Cityscapes folder to the table."""

import sys
import warnings
from argparse import Namespace
from collections.abc import Callable

import torch
from tqdm import tqdm

from emanet_triton.command import FAILED, answer, complain, run, say
from emanet_triton.data.png import read_image
from emanet_triton.errors import InputError, first_line, printable
from emanet_triton.eval import report
from emanet_triton.eval.finite import check_network
from emanet_triton.eval.options import parse
from emanet_triton.eval.partial import PartialResult, software
from emanet_triton.eval.plan import Job, Plan, make_plan
from emanet_triton.eval.ranks import Ranks, ranks
from emanet_triton.eval.runner import Result, evaluate
from emanet_triton.inference.predictor import Predictor

DEMONSTRATION = """
This was a demonstration: a small model, trained and evaluated on generated street scenes. Its
figures say nothing about Cityscapes. For a published model (the file is downloaded once):
  python -m emanet_triton.eval --data CITYSCAPES_ROOT \\
    --ckpt emanet_r50-d8_512x1024_80k_cityscapes"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _joined(parse(arguments)))


def _joined(args: Namespace) -> int:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(f"note: {first_line(message)}")
        with ranks(_note) as group:
            return _main(args, group)


def _main(args: Namespace, group: Ranks) -> int:
    interrupted = "interrupted before the first image"
    try:
        plan = make_plan(args, group)
        interrupted = "interrupted"
        _run(plan, args, group)
    except InputError as error:
        where = "" if group.first else f" on rank {group.rank}"
        return _fail(group.fail(f"error{where}: {error}"))
    except KeyboardInterrupt:
        return _fail(group.fail(interrupted))
    return 0


def _run(plan: Plan, args: Namespace, group: Ranks) -> None:
    tell = _note if group.first else _silent
    torch.set_num_threads(plan.threads)
    reports, partials = [], []
    for job in plan.jobs:
        tell(_title(job, plan, args))
        matrices = 3 if args.compare else 1  # of evaluate's result
        partial = PartialResult(
            plan.settings(job, args),
            group.rank,
            matrices,
            versions=software(plan.device),
            stamps=plan.stamps,
        )
        partials.append(partial)
        reports.append(_evaluate(job, plan, args, group, partial, tell))
    if group.first:
        try:  # before the tables: a terminal may be gone
            if args.json:
                report.write_json(args.json, reports, as_list=args.all)
        finally:
            _print(reports, plan, args)
    group.barrier()
    for partial in partials:  # only now is nothing of them needed any more
        partial.discard()


def _print(reports: list[report.Report], plan: Plan, args: Namespace) -> None:
    if not args.all:
        say(f"{report.class_table(reports[0])}\n")
    say(report.summary_table(reports))
    if args.compare:
        say(f"\n{report.comparison_table(reports)}")
    if plan.demo:
        say(DEMONSTRATION)


def _evaluate(
    job: Job,
    plan: Plan,
    args: Namespace,
    group: Ranks,
    partial: PartialResult,
    tell: Callable[[str], None],
) -> report.Report:
    predictor = plan.predictor(job, args, args.precision)
    other = plan.predictor(job, args, args.compare) if args.compare else None
    tell(_how(predictor, plan, args))
    image = read_image(plan.samples[0].image)
    for each in filter(None, (predictor, other)):
        check_network(each, image)
    result = evaluate(
        predictor,
        plan.samples,
        partial,
        outputs=plan.outputs_of(job),
        ranks=group,
        workers=args.workers,
        resume=args.resume,
        say=tell,
        other=other,
    )
    tell(_speed(result, len(plan.samples)))
    confusion, *compared = result.counts
    return report.Report(
        model=job.name,
        checkpoint=str(job.checkpoint.path),
        sha256=job.checkpoint.sha256,
        data=str(plan.data),
        split=args.split,
        images=len(plan.samples),
        protocol=job.protocol,
        ms_flip=job.ms_flip,
        reconstruct=job.reconstruct,
        precision=args.precision,
        device=str(plan.device),
        network=predictor.network_name,
        seconds=result.seconds,
        confusion=confusion,
        compared=report.Compared(args.compare, *compared) if compared else None,
        published=job.published(args.split, len(plan.samples)),
    )


def _title(job: Job, plan: Plan, args: Namespace) -> str:
    protocol = job.protocol
    views = f"{len(protocol.ratios)} scales, plain and mirrored" if job.ms_flip else "one view"
    without = "" if job.reconstruct else ", without the EM attention's reconstruction"
    return (
        f"{job.name}{without}\n"
        f"  weights   {job.checkpoint.path} (sha256 {job.checkpoint.sha256[:8]})\n"
        f"  data      {plan.data}, split {args.split}, {len(plan.samples)} images\n"
        f"  protocol  {protocol.version}, {protocol.mode}, {views}"
    )


def _how(predictor: Predictor, plan: Plan, args: Namespace) -> str:
    """What runs, with what was chosen where nothing was asked for."""
    where = f"{args.precision} on {plan.device}"
    if plan.device.type == "cpu":
        where += f", {plan.threads} thread{'s' * (plan.threads > 1)}"
    elif predictor.cuda_graphs:
        where += ", CUDA graphs"
    most = predictor.inputs_at_once
    batch = "one input at once" if most == 1 else f"up to {most} inputs at once"
    compared = f"; compared with {args.compare}" if args.compare else ""
    return f"  running   {predictor.network_name} network, {where}, {batch}{compared}"


def _speed(result: Result, images: int) -> str:
    rate = images / result.seconds if result.seconds else 0.0
    share = 100 * result.waiting / result.seconds if result.seconds else 0.0
    return (
        f"  took      {result.seconds:.1f} s, {rate:.2f} images a second; "
        f"{share:.0f}% of it waiting for files"
    )


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
