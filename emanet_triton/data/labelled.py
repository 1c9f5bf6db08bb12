"""Data sets of pictures in folders, each with a PNG file of ids: put together from their parts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emanet_triton.data.dataset import IGNORE, Class, Dataset, Found, Sample
from emanet_triton.data.picture import picture_size, read_picture
from emanet_triton.data.png import read_label_png
from emanet_triton.errors import InputError

LARGEST_ID = 2**16 - 1
_ILLEGAL = 2**8  # in the table from stored ids to train ids
_SHOWN = 8  # ids in a message


class Ids:
    """Turns the ids in label files into train ids, and back.

    Args:
        classes: for each class its ids, at least one; the first one is saved.
        ignored: the ids that are not scored; the first one is saved.
    """

    def __init__(
        self, classes: tuple[tuple[int, ...], ...], ignored: tuple[int, ...] = (IGNORE,)
    ) -> None:
        self._train_ids = np.full(LARGEST_ID + 1, _ILLEGAL, np.uint16)
        self._train_ids[list(ignored)] = IGNORE
        self._stored = np.full(2**8, ignored[0] if ignored else IGNORE, np.uint16)
        for index, ids in enumerate(classes):
            self._train_ids[list(ids)] = index
            self._stored[index] = ids[0]
        if self._stored.max() < 2**8:
            self._stored = self._stored.astype(np.uint8)
        self._legal = _ranges(sorted({*ignored, *(each for ids in classes for each in ids)}))

    @classmethod
    def counted(cls, classes: int, first: int = 0, ignored: int = IGNORE) -> "Ids":
        """Class k has the id ``first + k``."""
        return cls(tuple((first + k,) for k in range(classes)), (ignored,))

    def read(self, sample: Sample) -> np.ndarray:
        """The label of a sample as train ids, uint8 [H, W].

        Raises:
            InputError: the label PNG is not readable or holds an illegal id.
        """
        ids = read_label_png(sample.label)
        train_ids = np.take(self._train_ids, ids)
        illegal = np.unique(ids[train_ids == _ILLEGAL]).tolist()
        if not illegal:
            return train_ids.astype(np.uint8)
        shown = ", ".join(map(str, illegal[:_SHOWN])) + ", ..." * (len(illegal) > _SHOWN)
        raise InputError(
            f"{sample.label}: holds the ids {shown}, which no class has and which are not "
            f"ignored; expected {self._legal}"
        )

    def stored(self, train_ids: np.ndarray) -> np.ndarray:
        """The ids of predicted train ids, uint8 [H, W]: uint8, or uint16 if an id needs it."""
        return np.take(self._stored, train_ids)


def labelled_pictures(
    name: str,
    classes: tuple[Class, ...],
    folders: tuple[str, ...],
    find_files: Callable[[Path, str], Found],
    ids: Ids,
    *,
    published_on: tuple[str, int] | None = None,
    unscored: int | None = None,
    description: Mapping[str, Any] | None = None,
) -> Dataset:
    """A data set of JPEG, PNG, WebP, BMP or TIFF pictures (``data.picture``) and label PNGs.

    A prediction is saved as ``NAME.png`` with the ids of label files. See ``Dataset`` for the
    arguments.
    """
    return Dataset(
        name=name,
        classes=classes,
        folders=folders,
        find_files=find_files,
        read_labels=ids.read,
        prediction_name=_prediction_name,
        to_stored_ids=ids.stored,
        published_on=published_on,
        unscored=unscored,
        read_image=read_picture,
        image_size=picture_size,
        description=description,
    )


def _prediction_name(sample: Sample) -> str:
    return f"{sample.name}.png"


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as a text: ``"0 to 33, 255"``."""
    texts, start = [], numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != number + 1:
            texts.append(f"{start} to {number}" if start != number else str(number))
            start = following if following is not None else number
    return ", ".join(texts)
