"""The results of a picture or a video: their names, their contents, and which exist already."""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emanet_triton.data.dataset import Dataset
from emanet_triton.data.overlay import class_names, colored, overlay
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError
from emanet_triton.files import exists, write_output
from emanet_triton.predict.sources import Source

# The kinds of results: the endings of their names for a picture, and for a video, where a kind
# without a suffix is a folder with one file a frame.
KINDS = {
    "overlay": ("_overlay.png", "_overlay.mp4"),
    "color": ("_color.png", "_color.mp4"),
    "labels": ("_labels.png", "_labels"),
    "probabilities": ("_probabilities.npz", "_probabilities"),
}

_NAME_BYTES = 255  # the longest name of a file on Linux


@dataclass(frozen=True)
class Prediction:
    """The prediction for a picture or a frame.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: class indices, uint8 [H, W].
        probabilities: float32 [classes, H, W], or ``None`` if they are not saved.
    """

    image: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class Outputs:
    """What is saved, and where.

    Attributes:
        folder: of all results.
        kinds: some of ``KINDS``.
        dataset: whose classes the labels are.
        train_ids: save class indices as labels, instead of the data set's own ids.
        alpha: opacity of the colours in overlays.
        classes: the names of the classes to paint, or ``None`` for all.
        overwrite: write results anew that exist.
    """

    folder: Path
    kinds: tuple[str, ...]
    dataset: Dataset
    train_ids: bool
    alpha: float
    classes: tuple[str, ...] | None
    overwrite: bool = False

    def path(self, source: Source, kind: str) -> Path:
        """The file of a kind of result; for a video perhaps a folder."""
        ending = KINDS[kind][source.is_video]
        return self.folder / source.name.with_name(source.name.name + ending)

    def paths(self, source: Source) -> list[Path]:
        """All files and folders of a source's results."""
        return [self.path(source, kind) for kind in self.kinds]

    def missing(self, source: Source) -> dict[str, Path]:
        """The results of a source that are to be written, by their kinds.

        Results that exist were written whole, so they are complete.
        """
        paths = {kind: self.path(source, kind) for kind in self.kinds}
        return {k: p for k, p in paths.items() if self.overwrite or not exists(p)}

    def save(self, source: Source, prediction: Prediction) -> None:
        """Write the missing results of a picture.

        Raises:
            InputError: a file cannot be written.
        """
        for kind, path in self.missing(source).items():
            self.save_one(path, kind, prediction)

    def save_one(self, path: Path, kind: str, prediction: Prediction) -> None:
        """Write one result, whole, and make its folder.

        Raises:
            InputError: the file cannot be written.
        """
        _make_folder(path.parent)
        if kind == "probabilities":
            write_output(path, self._npz(prediction))
        else:
            write_png(path, self.picture(kind, prediction))

    def picture(self, kind: str, prediction: Prediction, legend: bool = True) -> np.ndarray:
        """An overlay or colours, uint8 RGB [H', W', 3], or ids, uint8 [H, W]."""
        image, labels = prediction.image, prediction.labels
        if kind == "overlay":
            return overlay(
                image,
                labels,
                self.dataset,
                alpha=self.alpha,
                legend=legend,
                classes=self.classes,
            )
        if kind == "color":
            return colored(labels, self.dataset, self.classes)
        return labels if self.train_ids else self.dataset.to_stored_ids(labels)

    def _npz(self, prediction: Prediction) -> bytes:
        assert prediction.probabilities is not None
        buffer = io.BytesIO()
        np.savez(
            buffer,
            probabilities=prediction.probabilities.astype(np.float16),
            classes=np.array(class_names(self.dataset)),
        )
        return buffer.getvalue()


def check_places(outputs: Outputs, sources: Iterable[Source], folders: Iterable[Path]) -> None:
    """Refuse results that would lie among the sources, or replace one.

    Raises:
        InputError: the output folder lies in a searched folder, a result would replace a source,
            or its name would be too long.
    """
    place = Path(os.path.realpath(outputs.folder))
    for folder in folders:
        if place.is_relative_to(os.path.realpath(folder)):
            raise InputError(
                f"--out {outputs.folder}: lies in the source folder {folder}; expected another "
                "place, so that no result becomes a source"
            )
    sources = list(sources)
    files = {os.path.realpath(s.path): s for s in sources if isinstance(s.path, Path)}
    for source in sources:
        for path in outputs.paths(source):
            if len(os.fsencode(path.name)) > _NAME_BYTES:
                raise InputError(f"{source}: the name is too long for the name of a result, {path}")
            if other := files.get(os.path.realpath(path)):
                raise InputError(
                    f"--out {outputs.folder}: the result {path} would replace the source {other}; "
                    "expected another place"
                )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be made ({error.strerror})") from None
