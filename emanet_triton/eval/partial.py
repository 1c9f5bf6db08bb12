"""What an unfinished evaluation has counted so far, kept so that another run can go on."""

import hashlib
import json
import shutil
import time
import warnings
from typing import Any

import torch
from torch import Tensor

from emanet_triton.eval.cityscapes import CLASSES
from emanet_triton.files import cache_folder, write_whole

_SECONDS_BETWEEN_WRITES = 5.0


class PartialResult:
    """The images that one process has finished, and what it has counted of them.

    All processes of a run write into one folder, named after what determines the result, each a
    file of its own. A run that goes on reads every file there and adds new ones.

    Args:
        settings: everything that determines the result, JSON values.
        rank: of the process, in the file's name.
        matrices: M, how many confusion matrices are counted.
    """

    def __init__(self, settings: dict[str, Any], rank: int = 0, matrices: int = 1) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings = json.loads(text)  # as a file gives it back: lists for tuples
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.folder = cache_folder() / "partial" / digest[:16]
        self._file = self.folder / f"{time.time_ns()}-{rank}.json"
        self.names: list[str] = []
        self.counts = torch.zeros(matrices, len(CLASSES), len(CLASSES), dtype=torch.int64)
        self.seconds = 0.0
        self._written = time.monotonic()

    def earlier(self) -> tuple[set[str], Tensor, float]:
        """Of all earlier files: the finished images, their counts, and the seconds they took.

        A file that does not read as one of these is left out: its images are evaluated again.
        """
        names: set[str] = set()
        total, seconds = torch.zeros_like(self.counts), 0.0
        for file in sorted(self.folder.glob("*.json")):
            try:
                content = json.loads(file.read_text())
                counts = torch.tensor(content["counts"], dtype=torch.int64)
                found, took = set(content["images"]), float(content["seconds"])
                usable = content["settings"] == self.settings and counts.shape == total.shape
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if usable and not names & found:
                names |= found
                total += counts
                seconds += took
        return names, total, seconds

    def discard(self) -> None:
        """Remove what earlier runs left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, names: list[str], counts: Tensor, seconds: float) -> None:
        """Add finished images, int64 [M, 19, 19] of theirs; ``seconds`` is this run's so far."""
        self.names += names
        self.counts += counts
        self.seconds = seconds
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write this process's file anew; a reader never sees half of it.

        Where it cannot be written the evaluation goes on, with a warning.
        """
        content = {
            "settings": self.settings,
            "images": self.names,
            "counts": self.counts.tolist(),
            "seconds": self.seconds,
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(content).encode())
        except OSError as error:
            warnings.warn(f"{self._file}: the partial result is not kept ({error})", stacklevel=2)
        self._written = time.monotonic()
