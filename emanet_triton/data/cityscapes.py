"""Cityscapes: its classes, its folders, and the ids in its label files."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emanet_triton.data.dataset import IGNORE, Class, Dataset, Files, Sample, visible
from emanet_triton.data.png import read_label_png
from emanet_triton.errors import InputError


@dataclass(frozen=True)
class CityscapesClass(Class):
    """A scored class; ``label_id`` and ``color`` as in cityscapesscripts' ``labels.py``."""

    label_id: int


# The index is the train id, the channel of the logits.
CLASSES = (
    CityscapesClass("road", (128, 64, 128), 7),
    CityscapesClass("sidewalk", (244, 35, 232), 8),
    CityscapesClass("building", (70, 70, 70), 11),
    CityscapesClass("wall", (102, 102, 156), 12),
    CityscapesClass("fence", (190, 153, 153), 13),
    CityscapesClass("pole", (153, 153, 153), 17),
    CityscapesClass("traffic light", (250, 170, 30), 19),
    CityscapesClass("traffic sign", (220, 220, 0), 20),
    CityscapesClass("vegetation", (107, 142, 35), 21),
    CityscapesClass("terrain", (152, 251, 152), 22),
    CityscapesClass("sky", (70, 130, 180), 23),
    CityscapesClass("person", (220, 20, 60), 24),
    CityscapesClass("rider", (255, 0, 0), 25),
    CityscapesClass("car", (0, 0, 142), 26),
    CityscapesClass("truck", (0, 0, 70), 27),
    CityscapesClass("bus", (0, 60, 100), 28),
    CityscapesClass("train", (0, 80, 100), 31),
    CityscapesClass("motorcycle", (0, 0, 230), 32),
    CityscapesClass("bicycle", (119, 11, 32), 33),
)

_LEGAL = {  # the stored ids of each kind of label file
    "labelIds": "0 to 33, or 255 for -1",
    "labelTrainIds": "0 to 18, or 255 for ignored",
}
_IMAGES, _LABELS = "leftImg8bit", "gtFine"
_IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_SUFFIXES = {kind: f"_gtFine_{kind}.png" for kind in _LEGAL}  # the first is preferred
_SHOWN_IDS = 8
_ILLEGAL = 254  # in the tables from stored ids to train ids


def _train_id_table(kind: str) -> np.ndarray:
    """The train id, ``IGNORE`` or ``_ILLEGAL`` of every id of 8 or 16 bits, uint8 [65536]."""
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


def read_labels(sample: Sample) -> np.ndarray:
    """Read the label of a sample as train ids, uint8 [H, W]: 0 to 18, or ``IGNORE``.

    Raises:
        InputError: the label PNG is not readable or holds an illegal id.
    """
    kind = sample.label.stem.rsplit("_", 1)[-1]
    ids = read_label_png(sample.label)
    try:
        return to_train_ids(ids, kind)
    except ValueError as error:
        raise InputError(f"{sample.label}: {error}") from error


def to_train_ids(labels: np.ndarray, kind: str) -> np.ndarray:
    """Turn the ids of a label file into train ids.

    Args:
        labels: ids of 8 or 16 bits, integers [H, W].
        kind: ``"labelIds"`` or ``"labelTrainIds"``.

    Returns:
        uint8 [H, W]: 0 to 18, or ``IGNORE``.

    Raises:
        ValueError: ``labels`` has an id that ``kind`` does not have.
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
    """Turn train ids, uint8 [H, W], into label ids, uint8 [H, W]; ``IGNORE`` becomes 0, unlabeled.

    Raises:
        IndexError: a value is no train id.
    """
    scored = train_ids != IGNORE
    label_ids = np.zeros_like(train_ids)
    label_ids[scored] = _LABEL_IDS[train_ids[scored]]
    return label_ids


def prediction_name(sample: Sample) -> str:
    """The file name of a prediction for the benchmark server (mmseg ``format_results``)."""
    return f"{sample.name}{_IMAGE_SUFFIX}"


def find_files(root: Path, split: str) -> tuple[Files, Files, list[str]]:
    """The images and labels of a split, and one line for each reason why it cannot be used.

    Images lie at ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png``, labels at
    ``gtFine/<split>/<city>/<name>_gtFine_labelIds.png`` or ``..._labelTrainIds.png``. If both
    label files exist, labelIds is read. Hidden files and folders are left out (``visible``).
    """
    problems = [p for tree in (root / _IMAGES, root / _LABELS) for p in _tree_problems(tree, split)]
    if problems:
        return {}, {}, problems
    images = _index(root / _IMAGES / split, _IMAGE_SUFFIX)
    labels = _index(root / _LABELS / split, *_LABEL_SUFFIXES.values())
    if not images:
        problems.append(f"{root / _IMAGES / split} holds no file <city>/<name>{_IMAGE_SUFFIX}")
    if not labels:
        suffixes = " or ".join(_LABEL_SUFFIXES.values())
        problems.append(f"{root / _LABELS / split} holds no file <city>/<name>{suffixes}")
    return images, labels, problems


def _tree_problems(tree: Path, split: str) -> list[str]:
    if not tree.is_dir():
        return [f"{tree} is missing"]
    if (tree / split).is_dir():
        return []
    splits = sorted(folder.name for folder in visible(tree) if folder.is_dir())
    return [f"{tree} has no '{split}', it has: {', '.join(splits) or 'nothing'}"]


def _index(folder: Path, *suffixes: str) -> Files:
    """The files of a split by name and city. If two have the same key, the earlier suffix wins."""
    files = [file for city in visible(folder) if city.is_dir() for file in visible(city)]
    return {
        (file.name.removesuffix(suffix), file.parent.name): file
        for suffix in reversed(suffixes)
        for file in files
        if file.name.endswith(suffix)
    }


CITYSCAPES = Dataset(
    name="Cityscapes",
    classes=CLASSES,
    folders=(_IMAGES, _LABELS),
    find_files=find_files,
    read_labels=read_labels,
    prediction_name=prediction_name,
    to_stored_ids=to_label_ids,
    published_on=("val", 500),
)
# Callers that know only Cityscapes import these two from here.
check_sample = CITYSCAPES.check
find_samples = CITYSCAPES.find_samples
