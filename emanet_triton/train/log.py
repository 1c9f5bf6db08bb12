"""What a training tells: lines, two CSV files and, if asked for, TensorBoard."""

import csv
import io
import re
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emanet_triton.errors import InputError
from emanet_triton.eval.metric import Scores
from emanet_triton.files import require_own, write_output

TRAIN_CSV, VAL_CSV, TENSORBOARD = "train.csv", "val.csv", "tensorboard"
_TRAIN = ("iteration", "loss", "main", "auxiliary", "accuracy", "lr", "images/s", "memory MB")
_VAL = ("iteration", "mIoU", "mAcc", "aAcc")


def require_own_tables(folder: Path) -> None:
    """Refuse to replace CSV files that no training wrote.

    Raises:
        InputError: the folder holds such a file.
    """
    for name, columns in ((TRAIN_CSV, _TRAIN), (VAL_CSV, _VAL)):
        beginning = re.compile(re.escape(",".join(columns).encode()))
        require_own(folder / name, beginning, "table of emanet-triton train")


class Log:
    """Writes the log of a training on its first process.

    Args:
        folder: gets the files.
        classes: names of the classes.
        begin: the first iteration of this run; entries of later iterations are removed, because
            they will come again.
        validated: the last iteration whose validation is finished; likewise.
        end: the last iteration.
        images: of one iteration, over all processes.
        device: whose memory is told.
        tensorboard: also write events for TensorBoard.
        say: prints a line for the user.

    Raises:
        InputError: a file cannot be written, or the package tensorboard is missing.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        begin: int,
        validated: int,
        end: int,
        images: int,
        device: torch.device,
        tensorboard: bool,
        say: Callable[[str], None],
    ) -> None:
        self._classes, self._images, self._device, self._say = classes, images, device, say
        self._train = _Csv(folder / TRAIN_CSV, _TRAIN, begin)
        self._val = _Csv(folder / VAL_CSV, (*_VAL, *classes), validated)
        self._events = _writer(folder / TENSORBOARD, begin) if tensorboard else None
        self._end, self._told = end, begin
        self._started = time.monotonic()

    def tell(self, iteration: int, losses: Sequence[float], accuracy: float, lr: float) -> None:
        """Write a line about the iterations since the last one.

        Args:
            iteration: the number of finished iterations.
            losses: total, main and auxiliary, means over these iterations and all processes.
            accuracy: of the last iteration, in percent.
            lr: learning rate of the last iteration.

        Raises:
            InputError: a file cannot be written.
        """
        count = iteration - self._told
        seconds = time.monotonic() - self._started
        rate = count * self._images / seconds
        memory = peak_memory(self._device) / 1e6
        left = timedelta(seconds=round((self._end - iteration) * seconds / count))
        total, main, auxiliary = losses
        self._say(
            f"iteration {iteration:{len(str(self._end))}}/{self._end}  loss {total:.4f} "
            f"(main {main:.4f}, auxiliary {auxiliary:.4f})  accuracy {accuracy:.1f}  "
            f"lr {lr:.2e}  {rate:.1f} images/s  {memory:.0f} MB  {left} left"
        )
        figures = (*losses, accuracy, lr, rate, memory)
        self._train.add(iteration, figures)
        if self._events:
            for name, value in zip(_TRAIN[1:], figures, strict=True):
                self._events.add_scalar(f"train/{name}", value, iteration)
        self._told, self._started = iteration, time.monotonic()

    def validated(self, iteration: int, scores: Scores) -> None:
        """Write the scores of a validation.

        Raises:
            InputError: a file cannot be written.
        """
        self._say(
            f"validation after iteration {iteration}: mIoU {scores.miou:.2f}, "
            f"mAcc {scores.macc:.2f}, aAcc {scores.aacc:.2f}"
        )
        figures = (scores.miou, scores.macc, scores.aacc)
        self._val.add(iteration, (*figures, *scores.iou.tolist()))
        if self._events:
            for name, value in zip(_VAL[1:], figures, strict=True):
                self._events.add_scalar(f"val/{name}", value, iteration)
            for name, value in zip(self._classes, scores.iou.tolist(), strict=True):
                self._events.add_scalar(f"val IoU/{name}", value, iteration)

    def picture(self, iteration: int, name: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 RGB [H, W, 3], for TensorBoard."""
        if self._events:
            self._events.add_image(name, picture, iteration, dataformats="HWC")

    @property
    def wants_pictures(self) -> bool:
        """Whether ``picture`` keeps anything."""
        return self._events is not None

    def leave_out(self, seconds: float) -> None:
        """Leave a time, such as that of a validation, out of the rate of the next line."""
        self._started += seconds

    def close(self) -> None:
        if self._events:
            self._events.close()


class _Csv:
    """A CSV file whose first column is the iteration.

    Args:
        path: of the file.
        columns: their names.
        last: rows of later iterations are removed, and so is a row that was not written whole.
    """

    def __init__(self, path: Path, columns: Sequence[str], last: int) -> None:
        self.path = path
        rows = [row for row in _rows(path) if len(row) == len(columns)]
        kept = [row for row in rows if row[0].isdecimal() and int(row[0]) <= last]
        write_output(path, _lines([columns, *kept]))

    def add(self, iteration: int, figures: Sequence[float]) -> None:
        """Append a row.

        Raises:
            InputError: the file cannot be written.
        """
        line = _lines([[iteration, *(f"{value:.9g}" for value in figures)]])
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.reader(file))
    except (OSError, csv.Error):
        return []


def _lines(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def peak_memory(device: torch.device) -> int:
    """Bytes: PyTorch's peak on a GPU, elsewhere the largest resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows lacks it

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _writer(folder: Path, begin: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs the package tensorboard: pip install '.[train]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=begin + 1)  # the first step that comes again
