"""Described data sets and their files, for tests."""

from pathlib import Path

import numpy as np
import pytest

from emanet_triton import Dataset
from emanet_triton.data.description import dataset_from
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError

PHOTOS = {"images": "photos/{split}/{name}.png", "labels": "masks/{split}/{name}.png"}
FLAT = PHOTOS | {"classes": ["sea", "sand"]}
LABEL = np.array([[0, 1], [255, 1]], np.uint8)


def described(**changes: object) -> Dataset:
    return dataset_from(FLAT | changes)


def write(root: Path, *names: str, images: str = "photos", labels: str = "masks") -> Path:
    """Write an image and a label for each name below the root."""
    for name in names:
        for folder, pixels in ((images, np.zeros((2, 2, 3), np.uint8)), (labels, LABEL)):
            path = root / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, pixels)
    return root


def names_in(dataset: Dataset, root: Path, split: str = "val") -> list[str]:
    return [sample.name for sample in dataset.find_samples(root, split)]


def unusable(dataset: Dataset, root: Path, split: str = "val") -> str:
    """The lines of the message about a split, after its heading."""
    with pytest.raises(InputError) as raised:
        dataset.find_samples(root, split)
    heading, _, lines = str(raised.value).partition("\n")
    assert heading == f"{root}: not usable as {dataset.name} split '{split}'"
    return "\n".join(line.strip() for line in lines.splitlines())
