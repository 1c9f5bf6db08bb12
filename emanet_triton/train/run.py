"""A whole training: from the plan to the last checkpoint."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emanet_triton.data.dataset import Sample
from emanet_triton.errors import InputError, first_line
from emanet_triton.eval.draw import side_by_side
from emanet_triton.eval.metric import scores
from emanet_triton.train.check import class_weights
from emanet_triton.train.folder import BEST, KEPT, LAST, Folder
from emanet_triton.train.group import Group, SharedError
from emanet_triton.train.log import Log
from emanet_triton.train.plan import Plan
from emanet_triton.train.samples import Batch, Batches, Crops, ending, load
from emanet_triton.train.stop import INTERRUPTED, Stop
from emanet_triton.train.trainer import Trainer
from emanet_triton.train.validation import validate

_WORKER_ENDED = re.compile("exited unexpectedly|killed by signal")
PICTURES = 4  # of each validation, for TensorBoard


class Run:
    """Trains, validates and saves, in one process or as one of several.

    Args:
        plan: what to do.
        group: the processes, joined.
        say: prints a line for the user.
        progress: is called with the number of finished iterations.

    Attributes:
        trainer: has the network.
        best: mIoU and iteration of the best validation so far, or ``None``.
        confusion: int64 [C, C] of the last validation, or ``None``.

    Raises:
        InputError: the files, the weights or the state of an earlier run cannot be used.
    """

    def __init__(
        self, plan: Plan, group: Group, say: Callable[[str], None], progress: Callable[[int], None]
    ) -> None:
        self._plan, self._group, self._say, self._progress = plan, group, say, progress
        folder = Folder(plan.out, plan.trained)
        # Each step that may fail on one process alone ends before the processes exchange anything.
        state = group.together(lambda: folder.read_state() if plan.resume else None)
        self._folder = folder
        if state is not None:
            with folder.refusing_incomplete():
                self._folder = folder.going_on(state["init"])
                _check_settings(state["settings"], self._settings())
                _check_origin(state["init"], plan.origin)
        network = group.together(plan.network)
        self.trainer = Trainer(network, plan.recipe, group, self._class_weights())
        self.best: tuple[float, int] | None = None
        self.confusion: Tensor | None = None
        self._stop = Stop()
        self._saved = self._validated = -1
        self._sums = torch.zeros(3, device=plan.device)  # of the losses since the last line
        self._count = 0  # of the iterations since the last line
        if state is not None:
            with self._folder.refusing_incomplete():
                self.trainer.load_state_dict(state["trainer"])
                self._saved, self._validated = self.trainer.iteration, state["validated"]
                self.best, self.confusion = state["best"], state["confusion"]
            self._tell(f"going on after iteration {self.trainer.iteration}")
        self._log = self._make_log() if group.first else None

    def __call__(self) -> None:
        """Train to the last iteration.

        Raises:
            InputError: a file cannot be read or written, the loss is not finite, or memory runs
                out. All that was saved before stays.
            KeyboardInterrupt: a signal asked for the end; the last whole iteration is saved.
        """
        plan, trainer = self._plan, self.trainer
        with self._stop, ending(self._batches()) as batches:
            self._validate_if_due()
            while trainer.iteration < plan.recipe.iterations:
                parts, problem = _next_parts(batches, plan.recipe.accumulate)
                self._end_for(problem or (INTERRUPTED if self._stop.asked else None))
                self._iterate(parts)
                self._progress(trainer.iteration)
                self._save_if_due()
                self._validate_if_due()
        if self._log:
            self._log.close()

    def _iterate(self, parts: list[Batch]) -> None:
        iteration, lr = self.trainer.iteration + 1, self.trainer.lr
        due = iteration % self._plan.log_every == 0 or iteration == self._plan.recipe.iterations
        losses, accuracy = self.trainer.step(parts, with_accuracy=due)
        self._sums += torch.stack(losses)
        self._count += 1
        if due:
            self._tell_losses(accuracy, lr)

    def _tell_losses(self, accuracy: Tensor, lr: float) -> None:
        """Tell the means since the last call, over all processes."""
        sums = torch.stack([*self._sums, accuracy * self._count])
        *losses, right = (self._group.sum(sums) / self._group.count / self._count).tolist()
        self._require_finite("loss", losses[0])
        if self._log:
            self._log.tell(self.trainer.iteration, losses, right, lr)
        self._sums.zero_()
        self._count = 0

    def _require_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = "no state was saved" if self._saved < 0 else "earlier states are kept"
            raise InputError(
                f"the {name} is not finite after iteration {self.trainer.iteration}; expected a "
                f"lower --lr, a longer --warmup or another --precision; {kept}"
            )

    def _save_if_due(self) -> None:
        plan, iteration = self._plan, self.trainer.iteration
        end = iteration == plan.recipe.iterations
        every = iteration % plan.save_every == 0 or iteration % plan.keep_every == 0
        if end or every or self._validation_is_due():
            self._save()

    def _save(self) -> None:
        """Write the last weights and the state, on the first process.

        The state comes last: if the process is killed before, the resumed training writes all files
        of this iteration again.
        """
        # The loss is of the weights before the last step, so it says nothing about that step.
        sums = torch.stack([self._sums[0], self.trainer.finite()])
        loss, network = self._group.sum(sums).tolist()
        self._require_finite("loss", loss)
        self._require_finite("network", network)
        self._saved = iteration = self.trainer.iteration
        if not self._group.first:
            return
        if iteration % self._plan.keep_every == 0:
            self._write_weights(KEPT.format(iteration), {})
        self._write_weights(LAST, {})
        self._write_state()

    def _write_state(self) -> None:
        self._folder.write_state(
            {
                "settings": self._settings(),
                "init": self._folder.trained.info["init"],
                "trainer": self.trainer.state_dict(),
                "validated": self._validated,
                "best": self.best,
                "confusion": self.confusion,
            }
        )

    def _write_weights(self, name: str, figures: dict[str, float]) -> None:
        info = {"iteration": self.trainer.iteration, **figures}
        self._folder.write_weights(name, self.trainer.result.state_dict(), info)

    def _validation_is_due(self) -> bool:
        plan, iteration = self._plan, self.trainer.iteration
        end = iteration == plan.recipe.iterations
        return bool(plan.val) and iteration > 0 and (end or iteration % plan.val_every == 0)

    def _validate_if_due(self) -> None:
        """Validate, unless this iteration is validated already; keep the best weights."""
        iteration = self.trainer.iteration
        if not self._validation_is_due() or self._validated == iteration:
            return
        begun = time.monotonic()
        plan, group = self._plan, self._group
        network = self.trainer.result
        group.share_buffers(network)
        self.confusion = validate(
            network,
            plan.protocol,
            plan.recipe.precision,
            plan.val,
            plan.dataset,
            group,
            plan.workers,
            self._after_sample,
        )
        self._validated = iteration
        found = scores(self.confusion, plan.dataset.unscored)
        better = self.best is None or found.miou > self.best[0] or math.isnan(self.best[0])
        if better:
            self.best = found.miou, iteration
        if self._log:
            self._log.validated(iteration, found)
            if better:
                self._write_weights(BEST, {"mIoU": found.miou})
            self._write_state()
            self._log.leave_out(time.monotonic() - begun)

    def _after_sample(
        self, sample: Sample, image: np.ndarray, labels: np.ndarray, predicted: Tensor
    ) -> None:
        """Give the first samples of a validation to TensorBoard, and end it for a signal.

        With several processes the validation goes on, because the others wait for its result.
        """
        plan = self._plan
        if self._stop.asked and self._group.count == 1:
            raise KeyboardInterrupt(f"{INTERRUPTED}; {_kept(self.trainer.iteration)}")
        if self._log and self._log.wants_pictures and sample in plan.val[:PICTURES]:
            picture = side_by_side(image, predicted.cpu().numpy(), labels, plan.dataset.classes)
            self._log.picture(self.trainer.iteration, f"val/{sample.name}", picture)

    def _end_for(self, own: str | None) -> None:
        """End on every process if one of them has a problem; the first one saves before.

        Raises:
            SharedError: with the problem.
            KeyboardInterrupt: the problem is a signal.
        """
        try:
            self._group.agree(own)
        except SharedError as problem:
            iteration = self.trainer.iteration
            if iteration > 0 and self._saved != iteration:
                self._save()
            message = f"{problem}; {_kept(iteration)}"
            if str(problem) == INTERRUPTED:
                raise KeyboardInterrupt(message) from None
            raise SharedError(message) from None

    def _batches(self) -> Iterator[Batch]:
        plan, group, recipe = self._plan, self._group, self._plan.recipe
        crops = Crops(plan.train, plan.dataset, recipe.augmentation, recipe.seed)
        batches = Batches(
            len(plan.train),
            recipe.batch_size // (group.count * recipe.accumulate),
            recipe.seed,
            group.rank,
            group.count,
            first=self.trainer.iteration * recipe.accumulate,
        )
        return load(crops, batches, plan.workers, pin_memory=plan.device.type == "cuda")

    def _class_weights(self) -> Tensor | None:
        plan = self._plan
        balance = plan.recipe.class_balance
        if not balance:
            return None
        weights = class_weights(plan.train, plan.dataset, balance, self._group, plan.workers)
        return weights.to(plan.device)

    def _make_log(self) -> Log:
        plan = self._plan
        return Log(
            plan.out,
            [each.name for each in plan.dataset.classes],
            begin=self.trainer.iteration,
            validated=self._validated,
            end=plan.recipe.iterations,
            images=plan.recipe.batch_size,
            device=plan.device,
            tensorboard=plan.tensorboard,
            say=self._say,
        )

    def _settings(self) -> dict[str, str]:
        """Everything that determines the weights of later iterations, as texts by option."""
        plan = self._plan
        names = "\n".join(sample.name for sample in (*plan.train, *plan.val))
        meaning = plan.dataset.description or {}
        names += json.dumps(
            [meaning.get("ignored"), [c["ids"] for c in meaning.get("classes", [])]]
        )
        return {
            **plan.settings,
            "--data": f"{len(plan.train)} images to train on, {len(plan.val)} to validate, "
            f"{hashlib.sha256(names.encode()).hexdigest()[:8]}",
            "ranks": str(self._group.count),
        }

    def _tell(self, line: str) -> None:
        if self._group.first:
            self._say(line)


def _kept(iteration: int) -> str:
    """What a training that ends early leaves."""
    if iteration == 0:
        return "nothing was trained yet"
    many = "1 iteration is" if iteration == 1 else f"{iteration} iterations are"
    return f"{many} kept, --resume goes on from there"


def _next_parts(batches: Iterator[Batch], count: int) -> tuple[list[Batch], str | None]:
    """The batches of an iteration, or why there are none."""
    try:
        parts = [next(batches) for _ in range(count)]
    except (RuntimeError, OSError, EOFError) as error:
        if isinstance(error, RuntimeError) and not _WORKER_ENDED.search(str(error)):
            raise
        return (
            [],
            f"a process that makes samples has ended ({first_line(error)}); expected fewer "
            "--workers, or more memory for them",
        )
    problem = next((part.problem for part in parts if part.problem), None)
    return parts, problem


def _check_origin(before: str, now: str | None) -> None:
    """Raise InputError if the options name other initial weights than a training began with."""
    if now is not None and Path(now).absolute() != Path(before).absolute():
        raise InputError(
            f"--resume: the training began with the weights {before}, not {now}; expected the "
            "same --init or --backbone, or --model alone"
        )


def _check_settings(before: dict[str, str], now: dict[str, str]) -> None:
    """Raise InputError if a training would go on with other settings."""
    changed = [
        f"{name} {before.get(name)} before, {now.get(name)} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(
            f"--resume: the settings differ: {'; '.join(changed)}; expected the same settings"
        )
