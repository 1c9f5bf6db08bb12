"""The pictures that an evaluation writes, and whether they can be written."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from emanet_triton.data.cityscapes import Sample, prediction_name, to_label_ids
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError
from emanet_triton.eval.draw import overlay
from emanet_triton.files import is_stream, require_folder


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
        for folder in self.folders().values():
            require_folder(folder)

    def folders(self) -> dict[str, Path]:
        """Option to the folder that it names, of those that were given."""
        named = {"--save-predictions": self.predictions, "--save-overlays": self.overlays}
        return {option: folder for option, folder in named.items() if folder}

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

    def pictures(self, sample: Sample) -> list[Path]:
        """The files that ``save`` writes."""
        return [folder / prediction_name(sample) for folder in self.folders().values()]


def keep_out(root: Path, places: Mapping[str, Path | None]) -> None:
    """See that nothing is written inside the trees of a data set.

    Args:
        root: of the data set.
        places: option to the file or folder that it names.

    Raises:
        InputError: a place inside.
    """
    for option, place in places.items():
        for tree in (root / "leftImg8bit", root / "gtFine"):
            if place and _real(place).is_relative_to(_real(tree)):
                raise InputError(
                    f"{option} {place}: lies in the data set's {tree}; expected another place"
                )


def refuse_overwriting(
    outputs: Outputs, json: Path | None, samples: Sequence[Sample], checkpoints: Sequence[Path]
) -> None:
    """See that no output, also through symbolic links, is an input or another output.

    Raises:
        InputError: one is.
    """
    kept = {_real(path): path for sample in samples for path in (sample.image, sample.label)}
    folders = {path.parent for path in kept}
    kept |= {_real(path): path for path in checkpoints}
    for option, folder in outputs.folders().items():
        if _real(folder) in folders:
            raise InputError(f"{option} {folder}: holds files of the data set; expected another")
        for sample in samples:
            picture = folder / prediction_name(sample)
            if picture.exists() and not picture.is_file():
                raise InputError(f"{option}: {picture} is no file; expected a place for a picture")
            _claim(kept, option, picture)
    if json and not is_stream(json):
        _claim(kept, "--json", json)


def _claim(kept: dict[Path, Path], option: str, path: Path) -> None:
    real = _real(path)
    if real in kept:
        raise InputError(f"{option}: {path} would overwrite {kept[real]}; expected another place")
    kept[real] = path


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
