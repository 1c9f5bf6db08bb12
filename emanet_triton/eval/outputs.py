"""The pictures that an evaluation writes, and whether they can be written."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from emanet_triton.data.dataset import Dataset, Sample
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError, first_line
from emanet_triton.eval.draw import side_by_side
from emanet_triton.files import is_stream, require_folder, require_own
from emanet_triton.kernels.out_of_memory import is_out_of_memory

# What ``report.write_json`` writes: a report, or a list of reports.
_REPORT = re.compile(rb'(\[\s*)?\{\s*"model": *"[^"]*",\s*"checkpoint":')


@dataclass(frozen=True)
class Outputs:
    """The folders into which an evaluation writes pictures; ``None`` where it writes none.

    Attributes:
        dataset: the data set whose images are evaluated.
        predictions: the folder for predicted classes, in the data set's own ids and file names.
        overlays: the folder for image, prediction, label and error side by side.
    """

    dataset: Dataset
    predictions: Path | None = None
    overlays: Path | None = None

    def prepare(self) -> None:
        """Make the folders and check that they can be written.

        Raises:
            InputError: a folder cannot be made or written.
        """
        for folder in self.folders().values():
            require_folder(folder)

    def folders(self) -> dict[str, Path]:
        """The folders that were given, by the option that names them."""
        named = {"--save-predictions": self.predictions, "--save-overlays": self.overlays}
        return {option: folder for option, folder in named.items() if folder}

    def __bool__(self) -> bool:
        return bool(self.predictions or self.overlays)

    def save(
        self, sample: Sample, image: np.ndarray, labels: np.ndarray, predicted: Tensor
    ) -> None:
        """Write the pictures of a sample.

        Args:
            sample: gives the pictures their name.
            image: uint8 RGB [H, W, 3].
            labels: train ids, uint8 [H, W].
            predicted: train ids, uint8 [H, W].

        Raises:
            InputError: a picture cannot be written, or memory does not suffice.
        """
        name, prediction = self.dataset.prediction_name(sample), predicted.cpu().numpy()
        try:
            if self.predictions:
                write_png(self.predictions / name, self.dataset.to_stored_ids(prediction))
            if self.overlays:
                picture = side_by_side(image, prediction, labels, self.dataset.classes)
                write_png(self.overlays / name, picture)
        except Exception as error:  # memory runs out under many names
            if not is_out_of_memory(error):
                raise
            raise InputError(
                f"{sample.image}: too little memory for its pictures ({first_line(error)})"
            ) from error

    def pictures(self, sample: Sample) -> list[Path]:
        """The files that ``save`` writes."""
        return [folder / self.dataset.prediction_name(sample) for folder in self.folders().values()]


def keep_out(dataset: Dataset, root: Path, places: Mapping[str, Path | None]) -> None:
    """Refuse to write into the folders of a data set.

    Args:
        dataset: says which folders hold its files.
        root: of the data set.
        places: the files and folders to write, by the option that names them.

    Raises:
        InputError: a place lies in such a folder.
    """
    for option, place in places.items():
        for tree in (root / folder for folder in dataset.folders):
            if place and _real(place).is_relative_to(_real(tree)):
                raise InputError(
                    f"{option} {place}: lies in the data set's {tree}; expected another place"
                )


def refuse_overwriting(
    outputs: Outputs, json: Path | None, samples: Sequence[Sample], checkpoints: Sequence[Path]
) -> None:
    """Refuse outputs that would overwrite an input or another output, also through a link.

    The JSON file may replace only an earlier one.

    Raises:
        InputError: an output would overwrite a file.
    """
    kept = {_real(path): path for sample in samples for path in (sample.image, sample.label)}
    folders = {path.parent for path in kept}
    kept |= {_real(path): path for path in checkpoints}
    for option, folder in outputs.folders().items():
        if _real(folder) in folders:
            raise InputError(f"{option} {folder}: holds files of the data set; expected another")
        for sample in samples:
            picture = folder / outputs.dataset.prediction_name(sample)
            if picture.exists() and not picture.is_file():
                raise InputError(f"{option}: {picture} is no file; expected a place for a picture")
            _claim(kept, option, picture)
    if json and not is_stream(json):
        _claim(kept, "--json", json)
        try:
            require_own(json, _REPORT, "JSON report of emanet-triton eval")
        except InputError as error:
            raise InputError(f"--json {error}") from None


def _claim(kept: dict[Path, Path], option: str, path: Path) -> None:
    real = _real(path)
    if real in kept:
        raise InputError(f"{option}: {path} would overwrite {kept[real]}; expected another place")
    kept[real] = path


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
