"""Small trees of files in the layouts of the public data sets, for tests."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from emanet_triton import Dataset
from emanet_triton.data.ade20k import ADE20K
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.png import write_png
from emanet_triton.data.voc import VOC2012

SETS = VOC2012, ADE20K, BDD100K, BDD100K_DRIVABLE
PLACES = {  # of the image and the label, by the name of the data set
    "Pascal VOC 2012": ("JPEGImages/{name}.jpg", "SegmentationClass/{name}.png"),
    "ADE20K": ("images/{split}/{name}.jpg", "annotations/{split}/{name}.png"),
    "BDD100K": ("images/10k/{split}/{name}.jpg", "labels/sem_seg/masks/{split}/{name}.png"),
    "BDD100K drivable": (
        "images/100k/{split}/{name}.jpg",
        "labels/drivable/masks/{split}/{name}.png",
    ),
}
LISTS = "ImageSets/Segmentation"


def places(dataset: Dataset, root: Path, name: str, split: str = "val") -> list[Path]:
    """The files of an image and its label."""
    folder = {"train": "training", "val": "validation"}[split] if dataset is ADE20K else split
    return [root / each.format(name=name, split=folder) for each in PLACES[dataset.name]]


def legal_ids(dataset: Dataset) -> np.ndarray:
    """All ids of the classes, in their order, and the ignored id."""
    if dataset is ADE20K:
        return np.array([*range(1, 151), 0], np.uint8)
    return np.array([*range(len(dataset.classes)), 255], np.uint8)


def jpeg(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())


def label(dataset: Dataset, path: Path, ids: np.ndarray) -> None:
    """Write a label as the data set does: VOC's have palettes, the others are grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if dataset is VOC2012:
        image = Image.fromarray(ids)
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        image.save(path)
    else:
        write_png(path, ids)


def write(
    dataset: Dataset,
    root: Path,
    *names: str,
    split: str = "val",
    size: tuple[int, int] = (32, 48),
) -> Path:
    """Write random images of this size, (height, width), whose labels hold legal ids."""
    rng, (height, width) = np.random.default_rng(len(names)), size
    for name in names:
        image_path, label_path = places(dataset, root, name, split)
        jpeg(image_path, rng.integers(0, 256, (height, width, 3), np.uint8))
        ids = rng.choice(legal_ids(dataset), (height // 8, width // 8))
        label(dataset, label_path, np.kron(ids, np.ones((8, 8), np.uint8)))
    if dataset is VOC2012:
        path = root / LISTS / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))
    return root
