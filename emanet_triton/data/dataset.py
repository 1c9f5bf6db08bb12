"""A data set as one value: its classes, its files, and what its labels mean."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emanet_triton.data import png
from emanet_triton.errors import InputError, one_line

IGNORE = 255  # the train id of pixels that are not scored, in every data set
_MOST_LINES = 20  # lines of a message that lists problems

Color = tuple[int, int, int]  # 8-bit RGB
Key = tuple[str, str]  # the name of a sample and its folder
Files = dict[Key, Path]


class FileProblem(NamedTuple):
    """A line about a problem with a file of a sample."""

    key: Key
    line: str


Found = tuple[Files, Files, Sequence[str | FileProblem]]  # images, labels, problems


@dataclass(frozen=True)
class Class:
    """A scored class: its name, and its colour in pictures."""

    name: str
    color: Color


@dataclass(frozen=True)
class Sample:
    """An image and its label; both share the name."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, repr=False)
class Dataset:
    """All that an evaluation needs to know about a data set.

    Images are PNG files unless ``read_image`` reads other kinds; labels are PNG files. Inside the
    package a label is an array of train ids: the index of a class in ``classes``, or ``IGNORE``.

    Attributes:
        name: of the data set, for messages.
        classes: the scored classes, at most 255, in the order of the network's channels.
        folders: below the root; they hold the images and labels, so nothing is written into them.
            "." is the root itself. Single files may be named, too.
        find_files: takes the root and the name of a split. Returns the images, the labels, and one
            line for each problem because of which the split cannot be used: as ``FileProblem`` if
            it is with a file of one sample, which ``limit`` may leave out. It may raise OSError.
        read_labels: reads the label of a sample as train ids, uint8 [H, W]. Raises InputError if
            the file is damaged or holds an illegal id.
        prediction_name: the file name under which the prediction for a sample is saved.
        to_stored_ids: turns predicted train ids, uint8 [H, W], into the ids that are saved, uint8
            or uint16 [H, W].
        published_on: the split, and the number of its images, on which the published figures of
            the models were measured; ``None`` if there are no such figures.
        unscored: the train id of a class that the network predicts and the benchmark does not
            score: pixels with this label do not count, and means leave the class out; or ``None``.
        read_image: reads an image as uint8 RGB [H, W, 3]. Raises InputError if it is damaged.
        image_size: reads (height, width) of an image, as ``read_image`` gives them, faster if it
            can. Raises InputError if the image is damaged.
        description: the JSON values from which ``data.description.dataset_from`` makes this data
            set again; ``None`` for a data set that is written in Python.
    """

    name: str
    classes: tuple[Class, ...]
    folders: tuple[str, ...]
    find_files: Callable[[Path, str], Found]
    read_labels: Callable[[Sample], np.ndarray]
    prediction_name: Callable[[Sample], str]
    to_stored_ids: Callable[[np.ndarray], np.ndarray]
    published_on: tuple[str, int] | None = None
    unscored: int | None = None
    read_image: Callable[[Path], np.ndarray] = png.read_image
    image_size: Callable[[Path], tuple[int, ...]] = png.png_size
    description: Mapping[str, Any] | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"<Dataset {self.name!r}: {len(self.classes)} classes>"

    def find(
        self, root: Path, split: str, limit: int | None = None
    ) -> tuple[list[Sample], list[str]]:
        """Find the samples of a split, sorted by name.

        Args:
            root: the folder that contains ``folders``.
            split: the name of the split.
            limit: use only the first ``limit`` names, and ignore the files of later names.

        Returns:
            The images that have a label, and one line for each problem with the other files: an
            image without a label, a label without an image, a name that two folders use.

        Raises:
            InputError: the split cannot be used at all.
        """
        if limit is not None and limit < 1:
            raise InputError(f"limit {limit}: expected at least 1 image")
        try:
            if not root.is_dir():
                expected = " and ".join(f for f in self.folders if f != ".") or "its files"
                problem = f"there is no such folder; expected one with {expected}"
                raise self._unusable(root, split, [problem])
            images, labels, found = self.find_files(root, split)
        except OSError as error:
            raise self._unusable(root, split, [f"it cannot be read ({error})"]) from None
        keys = sorted(images.keys() | labels.keys())[:limit]
        problems = _lines(found, set(keys))
        if problems or not keys:
            raise self._unusable(root, split, problems or ["it holds no image and no label"])
        pairs = [key for key in keys if key in images and key in labels]
        samples = [Sample(key[0], images[key], labels[key]) for key in pairs]
        return samples, _pair_problems(keys, images, labels)

    def find_samples(
        self, root: Path, split: str = "val", limit: int | None = None
    ) -> list[Sample]:
        """The samples of a split, see ``find``.

        Raises:
            InputError: the split cannot be used, or any of its files has a problem.
        """
        samples, problems = self.find(root, split, limit)
        if problems:
            raise self._unusable(root, split, problems)
        return samples

    def check(self, sample: Sample) -> list[str]:
        """One line for each problem with the files of a sample; no line if they are sound.

        Both files must be intact and of the same size, and every id of the label legal. The pixels
        of an image that is a PNG are not decoded (``png_size``).
        """
        problems: list[str] = []
        sizes: list[tuple[int, ...]] = []
        for size in (lambda: self.image_size(sample.image), lambda: self.read_labels(sample).shape):
            try:
                sizes.append(size())
            except InputError as error:
                problems.append(str(error))
        if len(set(sizes)) == 2:
            (h, w), (label_h, label_w) = sizes
            problems.append(f"{sample.label}: {label_w}x{label_h} pixels, its image has {w}x{h}")
        return problems

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Read a sample: the image, uint8 RGB [H, W, 3], and its train ids, uint8 [H, W].

        Raises:
            InputError: a file is damaged, holds an illegal id, or differs in size from the other.
        """
        image, labels = self.read_image(sample.image), self.read_labels(sample)
        (height, width), (label_height, label_width) = image.shape[:2], labels.shape
        if image.shape[:2] != labels.shape:
            raise InputError(
                f"{sample.image}: {width}x{height} pixels, its label has "
                f"{label_width}x{label_height}; expected equal sizes"
            )
        return image, labels

    def _unusable(self, root: Path, split: str, problems: list[str]) -> InputError:
        return problems_error(f"{root}: not usable as {self.name} split '{split}'", problems)


def visible(folder: Path) -> Iterator[Path]:
    """The entries of a folder whose names do not begin with a dot.

    macOS leaves a ``._NAME`` beside every file that it copies to another file system.

    Raises:
        OSError: the folder may not be read; ``Path.glob`` would leave it out.
    """
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def problems_error(heading: str, problems: list[str]) -> InputError:
    """One error that lists the problems below a heading, in at most 20 lines."""
    most = _MOST_LINES - 1  # the heading is a line, too
    shown = problems if len(problems) <= most else problems[: most - 1]
    lines = [f"  {one_line(problem)}" for problem in shown]
    if left := len(problems) - len(shown):
        lines.append(f"  ... and {left} more")
    return InputError("\n".join([heading, *lines]))


def _lines(problems: Sequence[str | FileProblem], keys: set[Key]) -> list[str]:
    """The problems without those of other samples."""
    return [
        problem if isinstance(problem, str) else problem.line
        for problem in problems
        if isinstance(problem, str) or problem.key in keys
    ]


def _pair_problems(keys: list[Key], images: Files, labels: Files) -> list[str]:
    problems = [f"{images[key]} has no label" for key in keys if key not in labels]
    problems += [f"{labels[key]} has no image" for key in keys if key not in images]
    problems += [
        f"the name '{name}' is used in two folders, {first} and {second}"
        for (name, first), (other, second) in pairwise(keys)
        if name == other
    ]
    return problems
