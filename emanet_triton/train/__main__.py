"""``python -m emanet_triton.train``: train an EMANet on a data set."""

import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence

import torch
from tabulate import tabulate
from tqdm import tqdm

from emanet_triton.command import FAILED, answer, complain, program, run, say
from emanet_triton.errors import InputError, first_line, printable
from emanet_triton.eval.metric import scores
from emanet_triton.eval.report import class_table
from emanet_triton.inference.build import open_device
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.progress import Bar
from emanet_triton.train.check import check_files
from emanet_triton.train.folder import BEST, LAST
from emanet_triton.train.group import Group, SharedError, find_group, has_lost_others, joined
from emanet_triton.train.options import parse
from emanet_triton.train.plan import Plan, make_plan
from emanet_triton.train.preview import preview
from emanet_triton.train.run import Run
from emanet_triton.train.stop import INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return answer(lambda: _main(parse(arguments)))


def _main(args: Namespace) -> int:
    place = find_group()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: _note(f"note: {first_line(message)}", place)
        device = open_device(args.device, (args.precision,), place.local_rank)
        with joined(place, device) as group:
            try:
                return _run(args, device, group)
            except SharedError as error:
                return _fail(f"error: {error}" if group.first else "")
            except KeyboardInterrupt as interrupt:
                return _fail((str(interrupt) or INTERRUPTED) if group.first else "")
            except InputError as error:
                return _fail(f"error{group.name}: {error}")
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    return _fail(f"error{group.name}: {_too_little_memory(error)}")
                if group.count == 1 or not has_lost_others(error):
                    raise
                return _fail(
                    f"error{group.name}: another rank has ended, and says why; --resume goes on "
                    "from the last save"
                )


def _run(args: Namespace, device: torch.device, group: Group) -> int:
    plan = group.together(lambda: make_plan(args, device, group))
    torch.set_num_threads(plan.threads)
    torch.backends.cudnn.benchmark = True  # all samples have one size; as in mmseg's configs
    if plan.check:
        check_files([*plan.train, *plan.val], plan.dataset, group, max(plan.workers, 1))
    if plan.dry_run:
        return _preview(plan, group)
    with Bar(total=plan.recipe.iterations, unit="iteration", disable=not group.first) as bar:

        def progress(done: int) -> None:
            bar.update(done - bar.n)

        training = group.together(lambda: Run(plan, group, _line, progress))
        bar.initial = bar.n = training.trainer.iteration
        training()
    if group.first:
        _print(plan, training)
    return 0


def _print(plan: Plan, training: Run) -> None:
    best = LAST
    if training.confusion is not None and training.best is not None:
        names = [each.name for each in plan.dataset.classes]
        say(f"\n{class_table(names, scores(training.confusion, plan.dataset.unscored))}\n")
        miou, iteration = training.best
        say(f"best mIoU {miou:.2f}, after iteration {iteration}: {plan.out / BEST}")
        best = BEST
    say(f"last weights: {plan.out / LAST}")
    say(f"to use them: {program('predict')} --ckpt {plan.out / best} PICTURE")


def _preview(plan: Plan, group: Group) -> int:
    path, parts = preview(plan, group)
    say(f"{path}: eight training samples beside their labels\n")
    rows = [(name, f"{size / 1e6:.1f}") for name, size in parts]
    say(tabulate(rows, ("memory of one iteration", "MB"), tablefmt="github", floatfmt=".1f"))
    return 0


def _too_little_memory(error: BaseException) -> str:
    return (
        f"too little memory for an iteration ({first_line(error)}); expected a larger "
        "--accumulate, a smaller --batch-size or --crop, --checkpointing or another --precision"
    )


def _fail(message: str) -> int:
    if message:
        complain(message)
    return FAILED


def _line(text: str) -> None:
    tqdm.write(printable(text), file=sys.stdout)


def _note(text: str, group: Group) -> None:
    if group.first:
        tqdm.write(printable(text), file=sys.stderr)


if __name__ == "__main__":
    run(main)
