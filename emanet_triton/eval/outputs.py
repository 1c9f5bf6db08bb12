"""The pictures that an evaluation writes, and whether they can be written."""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from emanet_triton.errors import InputError
from emanet_triton.eval.cityscapes import Sample, prediction_name, to_label_ids
from emanet_triton.eval.draw import overlay
from emanet_triton.eval.png import write_png

PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Outputs:
    """Folders for what an evaluation draws; ``None`` for nothing.

    Attributes:
        predictions: label ids under the benchmark server's names.
        overlays: image, prediction, label and error side by side.
    """

    predictions: Path | None = None
    overlays: Path | None = None

    def prepare(self) -> None:
        """Make the folders and see that they can be written, before anything is computed.

        Raises:
            InputError: a folder that cannot be made or written.
        """
        for folder in filter(None, (self.predictions, self.overlays)):
            require_writable(folder / "x")

    def __bool__(self) -> bool:
        return bool(self.predictions or self.overlays)

    def save(
        self, sample: Sample, image: np.ndarray, labels: np.ndarray, predicted: Tensor
    ) -> None:
        """Write what was asked for; all are uint8, ``labels`` and ``predicted`` train ids."""
        name, pred = prediction_name(sample), predicted.cpu().numpy()
        if self.predictions:
            write_png(self.predictions / name, to_label_ids(pred))
        if self.overlays:
            write_png(self.overlays / name, overlay(image, pred, labels))

    def drawn(self, sample: Sample) -> bool:
        """Whether all pictures of a sample are there and whole from the first byte to the last."""
        name = prediction_name(sample)
        folders = filter(None, (self.predictions, self.overlays))
        return all(_is_whole(folder / name) for folder in folders)

    def remove_leftovers(self, samples: list[Sample], before: float) -> None:
        """Remove what killed runs left half-written of these samples' pictures.

        ``before`` is a time in s since the epoch: younger files may still be written.
        """
        names = {prediction_name(sample) for sample in samples}
        for folder in filter(None, (self.predictions, self.overlays)):
            for path in folder.glob(".*.tmp"):  # as ``write_whole`` names them
                name, end, _ = path.name[1:].partition(".png.")
                if end and f"{name}.png" in names:
                    _remove_if_older(path, before)


def require_writable(file: Path) -> None:
    """Make the folder of ``file`` and see that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):  # a name of its own for every rank
            pass
    except OSError as error:
        raise InputError(
            f"{file.parent}: expected a folder that can be written ({error.strerror})"
        ) from None
    if file.is_dir():
        raise InputError(f"{file}: expected a file to write, this is a folder")


def _is_whole(path: Path) -> bool:
    """Whether a PNG begins and ends as one; the pixels between are not read."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            return False
        with path.open("rb") as file:
            begin = file.read(len(PNG_BEGIN))
            file.seek(-len(PNG_END), os.SEEK_END)
            return (begin, file.read()) == (PNG_BEGIN, PNG_END)
    except OSError:
        return False


def _remove_if_older(path: Path, before: float) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_mtime < before:
            path.unlink()
