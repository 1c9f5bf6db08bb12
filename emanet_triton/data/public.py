"""The public data sets that this package knows, by name."""

from collections.abc import Iterator
from pathlib import Path

from emanet_triton.data.ade20k import ADE20K
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Dataset
from emanet_triton.data.voc import VOC2012
from emanet_triton.errors import InputError

DATASETS = {
    "cityscapes": CITYSCAPES,
    "voc2012": VOC2012,
    "ade20k": ADE20K,
    "bdd100k": BDD100K,
    "bdd100k-drivable": BDD100K_DRIVABLE,
}


def find_dataset(dataset: Dataset | str) -> Dataset:
    """The data set of a name, or the given one.

    Raises:
        InputError: there is no data set of this name.
    """
    if not isinstance(dataset, str):
        return dataset
    if dataset not in DATASETS:
        raise InputError(f"unknown data set '{dataset}'; expected one of: {', '.join(DATASETS)}")
    return DATASETS[dataset]


def in_folder(root: Path) -> Iterator[str]:
    """The names of the data sets whose folders lie in a folder."""
    for name, dataset in DATASETS.items():
        if all((root / folder).is_dir() for folder in dataset.folders):
            yield name
