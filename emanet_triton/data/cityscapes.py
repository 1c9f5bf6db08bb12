"""Cityscapes: its classes, its folders, and the checks a data set passes before it is used."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from emanet_triton.data.png import png_size, read_label_png
from emanet_triton.errors import InputError, one_line

IGNORE = 255  # the train id of pixels that are not scored


@dataclass(frozen=True)
class CityscapesClass:
    """A scored class; ``label_id`` and ``color`` (RGB) as in cityscapesscripts' ``labels.py``."""

    name: str
    label_id: int
    color: tuple[int, int, int]


# The index is the train id, the channel of the logits.
CLASSES = (
    CityscapesClass("road", 7, (128, 64, 128)),
    CityscapesClass("sidewalk", 8, (244, 35, 232)),
    CityscapesClass("building", 11, (70, 70, 70)),
    CityscapesClass("wall", 12, (102, 102, 156)),
    CityscapesClass("fence", 13, (190, 153, 153)),
    CityscapesClass("pole", 17, (153, 153, 153)),
    CityscapesClass("traffic light", 19, (250, 170, 30)),
    CityscapesClass("traffic sign", 20, (220, 220, 0)),
    CityscapesClass("vegetation", 21, (107, 142, 35)),
    CityscapesClass("terrain", 22, (152, 251, 152)),
    CityscapesClass("sky", 23, (70, 130, 180)),
    CityscapesClass("person", 24, (220, 20, 60)),
    CityscapesClass("rider", 25, (255, 0, 0)),
    CityscapesClass("car", 26, (0, 0, 142)),
    CityscapesClass("truck", 27, (0, 0, 70)),
    CityscapesClass("bus", 28, (0, 60, 100)),
    CityscapesClass("train", 31, (0, 80, 100)),
    CityscapesClass("motorcycle", 32, (0, 0, 230)),
    CityscapesClass("bicycle", 33, (119, 11, 32)),
)

LabelKind = Literal["labelIds", "labelTrainIds"]

_LEGAL = {
    "labelIds": "0 to 33, or 255 for -1",
    "labelTrainIds": "0 to 18, or 255 for ignored",
}
_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIXES = {kind: f"_gtFine_{kind}.png" for kind in _LEGAL}  # the first is preferred
_Key = tuple[str, str]  # (name, city)
_SHOWN_PROBLEMS = 20
_SHOWN_IDS = 8
_ILLEGAL = 254  # in the tables from stored ids to train ids


def _train_id_table(kind: LabelKind) -> np.ndarray:
    """uint8 [65536], from any id of 8 or 16 bits to a train id, ``IGNORE`` or ``_ILLEGAL``."""
    table = np.full(2**16, _ILLEGAL, np.uint8)
    if kind == "labelIds":
        table[:34] = IGNORE
        table[[2**8 - 1, 2**16 - 1]] = IGNORE  # -1, the licence plate, in 8 and in 16 bits
        table[[c.label_id for c in CLASSES]] = range(len(CLASSES))
    else:
        table[: len(CLASSES)] = range(len(CLASSES))
        table[IGNORE] = IGNORE
    return table


_TRAIN_IDS = {kind: _train_id_table(kind) for kind in _LEGAL}
_LABEL_IDS = np.array([c.label_id for c in CLASSES], np.uint8)


@dataclass(frozen=True)
class Sample:
    """An image and its label; ``name`` is the stem both share, ``<city>_<seq>_<frame>``."""

    name: str
    image: Path
    label: Path


def find_samples(root: Path, split: str = "val", limit: int | None = None) -> list[Sample]:
    """The samples of a split, sorted by name.

    Images lie at ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png``, labels at
    ``gtFine/<split>/<city>/<name>_gtFine_labelIds.png`` or ``..._labelTrainIds.png``; of both,
    which say the same, labelIds are read. Files and folders whose name begins with a dot are left
    out: macOS leaves a ``._NAME`` beside every file that it copies to another file system.

    Args:
        root: the folder of ``leftImg8bit`` and ``gtFine``.
        split: a folder in both.
        limit: take the first so many names only; what lies after them is not looked at.

    Raises:
        InputError: a folder is missing, unreadable or without samples, an image has no label, a
            label no image, or two cities share a name; all of it in one message.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: expected at least 1 image")
    image_root, label_root = root / "leftImg8bit" / split, root / "gtFine" / split
    try:
        problems = _folder_problems(root, split)
        if not problems:
            images = _index(image_root, _IMAGE_SUFFIX)
            labels = _index(label_root, *_LABEL_SUFFIXES.values())
    except OSError as error:
        problems = [f"it cannot be read ({error})"]
    if not problems:
        problems = [
            f"{folder} holds no file <city>/<name>{suffix}"
            for folder, suffix, found in (
                (image_root, _IMAGE_SUFFIX, images),
                (label_root, " or ".join(_LABEL_SUFFIXES.values()), labels),
            )
            if not found
        ]
    if not problems:
        keys = sorted(images.keys() | labels.keys())[:limit]
        problems = _pair_problems(keys, images, labels)
    if problems:
        raise problems_error(f"{root}: not usable as Cityscapes split '{split}'", problems)
    return [Sample(key[0], images[key], labels[key]) for key in keys]


def check_sample(sample: Sample) -> list[str]:
    """What is wrong with a sample's files, one line each; an empty list if nothing is.

    Both PNGs must be intact and of the same size, and every id of the label legal. The image is
    not decoded (``png_size``).
    """
    problems, sizes = [], []
    for size in (lambda: png_size(sample.image), lambda: read_labels(sample).shape):
        try:
            sizes.append(size())
        except InputError as error:
            problems.append(str(error))
    if len(set(sizes)) == 2:
        (h, w), (label_h, label_w) = sizes
        problems.append(f"{sample.label}: {label_w}x{label_h} pixels, its image has {w}x{h}")
    return problems


def read_labels(sample: Sample) -> np.ndarray:
    """The sample's train ids, uint8 [H, W]: 0 to 18, or ``IGNORE``.

    Raises:
        InputError: the label PNG is not readable or holds an illegal id.
    """
    kind = sample.label.stem.rsplit("_", 1)[-1]
    ids = read_label_png(sample.label)
    try:
        return to_train_ids(ids, kind)
    except ValueError as error:
        raise InputError(f"{sample.label}: {error}") from error


def to_train_ids(labels: np.ndarray, kind: LabelKind) -> np.ndarray:
    """Stored ids, integers [H, W] of 8 or 16 bits, to train ids, uint8 [H, W] with ``IGNORE``.

    Raises:
        ValueError: an id that ``kind`` does not have.
    """
    train_ids = _TRAIN_IDS[kind][labels]
    illegal = np.unique(labels[train_ids == _ILLEGAL]).tolist()
    if not illegal:
        return train_ids
    shown = ", ".join(map(str, illegal[:_SHOWN_IDS])) + ", ..." * (len(illegal) > _SHOWN_IDS)
    message = f"illegal {kind} {shown}; expected {_LEGAL[kind]}"
    if kind == "labelTrainIds" and illegal[-1] <= 33:
        message += " (these look like labelIds)"
    raise ValueError(message)


def to_label_ids(train_ids: np.ndarray) -> np.ndarray:
    """Train ids, uint8 [H, W], to label ids, uint8 [H, W]; ``IGNORE`` becomes 0, unlabeled.

    Raises:
        IndexError: a value that is no train id.
    """
    scored = train_ids != IGNORE
    label_ids = np.zeros_like(train_ids)
    label_ids[scored] = _LABEL_IDS[train_ids[scored]]
    return label_ids


def prediction_name(sample: Sample) -> str:
    """The file name of a prediction for the benchmark server (mmseg ``format_results``)."""
    return f"{sample.name}{_IMAGE_SUFFIX}"


def visible(folder: Path) -> Iterator[Path]:
    """What a folder holds, without names that begin with a dot.

    Raises:
        OSError: the folder may not be read; ``Path.glob`` would leave it out.
    """
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def problems_error(heading: str, problems: list[str]) -> InputError:
    """One error that lists all problems below its heading, or the first 20 and how many more."""
    lines = [f"  {one_line(problem)}" for problem in problems[:_SHOWN_PROBLEMS]]
    if left := len(problems) - len(lines):
        lines.append(f"  ... and {left} more")
    return InputError("\n".join([heading, *lines]))


def _folder_problems(root: Path, split: str) -> list[str]:
    if not root.is_dir():
        return ["there is no such folder; expected one with leftImg8bit and gtFine"]
    problems = []
    for tree in (root / "leftImg8bit", root / "gtFine"):
        if not tree.is_dir():
            problems.append(f"{tree} is missing")
        elif not (tree / split).is_dir():
            splits = sorted(folder.name for folder in visible(tree) if folder.is_dir())
            problems.append(f"{tree} has no '{split}', it has: {', '.join(splits) or 'nothing'}")
    return problems


def _index(folder: Path, *suffixes: str) -> dict[_Key, Path]:
    """The files of a split folder; of two with one key, that with the earlier suffix."""
    files = [file for city in visible(folder) if city.is_dir() for file in visible(city)]
    return {
        (file.name.removesuffix(suffix), file.parent.name): file
        for suffix in reversed(suffixes)
        for file in files
        if file.name.endswith(suffix)
    }


def _pair_problems(
    keys: list[_Key], images: dict[_Key, Path], labels: dict[_Key, Path]
) -> list[str]:
    problems = [f"{images[key]} has no label" for key in keys if key not in labels]
    problems += [f"{labels[key]} has no image" for key in keys if key not in images]
    problems += [
        f"the name '{name}' is used in two cities, {first} and {second}"
        for (name, first), (other, second) in pairwise(keys)
        if name == other
    ]
    return problems
