"""Files and data sets as other projects publish them, for tests."""

import pickle
from dataclasses import replace
from pathlib import Path

import checkpoint_files
import golden_data
import numpy as np
import torch
from checkpoint_files import Listed, listed_in_others, small, with_blocks, with_classes
from other_golden import small_architecture, weights_of
from public_sets import write

from emanet_triton import Dataset
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import write_png
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.entries import ZooEntry
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import ZOO

R50 = (3, 4, 6, 3)
SIZE = (40, 56)  # of the images


def mmseg_keys(classes: int) -> Listed:
    """The keys of a published file of BDD100K, whose network is mmsegmentation's."""
    listed = golden_data.listed_keys("r50")
    heads = ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")
    return [
        (key, [classes, *shape[1:]] if key.startswith(heads) else shape, dtype)
        for key, shape, dtype in listed
    ]


FILES = {
    "emanet_r50-d8_769x769_40k_sem_seg_bdd100k": lambda: mmseg_keys(19),
    "emanet_r50-d8_512x1024_40k_drivable_bdd100k": lambda: mmseg_keys(3),
    "emanet_resnet50os16_voc": lambda: listed_in_others("sssegmentation_r50os16"),
    "emanet_resnet50os8_ade20k": lambda: listed_in_others("sssegmentation_r50os8"),
    "emanet_resnet50os8_cityscapes": lambda: with_blocks(
        listed_in_others("sssegmentation_r101os8"), R50
    ),
    "emanet_r101_voc_official": lambda: listed_in_others("official_r101"),
    "emanet_resnet50_os8_cityscapes_1024x512_80k": lambda: listed_in_others("paddleseg_r50"),
    "emanet_resnet50_os8_voc12aug_512x512_40k": lambda: with_classes(
        listed_in_others("paddleseg_r50"), 21
    ),
}
SMALL_PROTOCOLS = {  # the published ones, for images of ``SIZE``
    (1281, 721): {"base_scale": (97, 65), "crop": (49, 49), "stride": (33, 33)},
    (1280, 720): {"base_scale": (80, 48)},
    (2048, 512): {"base_scale": (96, 48)},
    (2048, 1024): {"base_scale": (96, 48)},
}


def smaller(protocol: Protocol) -> Protocol:
    changes = {} if protocol.base_scale is None else SMALL_PROTOCOLS[protocol.base_scale]
    padding = {"pad_size": (64, 64)} if protocol.pad_size else {}
    return replace(protocol, **changes, **padding)


def write_file(name: str, listed: Listed, folder: Path) -> Path:
    """Write the file of a model as its project publishes it."""
    entry = ZOO[name]
    weights = weights_of(entry.architecture.layout, listed)
    path = folder / entry.file
    if entry.source == "paddleseg":
        arrays = {key: value.numpy() for key, value in weights.items()}
        names = {"StructuredToParameterName@@": {key: f"p_{key}" for key in arrays}}
        path.write_bytes(pickle.dumps(arrays | names, protocol=4))
    elif entry.source == "bdd100k":
        torch.save({"meta": {"mmseg_version": "0.18.0"}, "state_dict": weights}, path)
    else:
        container = {"sssegmentation": "model", "official": "net"}[entry.source]
        checkpoint_files.save({container: weights}, path)
    return path


def write_tree(dataset: Dataset, root: Path, *names: str) -> Path:
    """Images of a data set and any labels."""
    if dataset is not CITYSCAPES:
        return write(dataset, root, *names, size=SIZE)
    for name in names:
        pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
        for path, values in zip(
            city_places(root, name), (pixels, pixels[..., 0] % 19), strict=True
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, values)
    return root


def city_places(root: Path, name: str) -> list[Path]:
    return [
        root / f"leftImg8bit/val/bonn/{name}_leftImg8bit.png",
        root / f"gtFine/val/bonn/{name}_gtFine_labelTrainIds.png",
    ]


def small_entry(name: str) -> ZooEntry:
    """The entry of a model, with a small network and a protocol for small images."""
    entry = ZOO[name]
    architecture = small_architecture(entry.architecture)
    return replace(entry, architecture=architecture, protocol=smaller(entry.protocol))


def write_small_file(name: str, folder: Path) -> Path:
    """The file of a model whose entry in the zoo is ``small_entry(name)``."""
    entry = ZOO[name]
    classes = len(entry.dataset.classes)
    if entry.source == "bdd100k":
        network = EMANet(entry.architecture, entry.protocol, classes)
        shapes = [(key, list(value.shape), "") for key, value in network.state_dict().items()]
        return write_file(name, shapes, folder)
    layout = entry.architecture.layout
    listed = {"sssegmentation": "sssegmentation_r50os8", "paddleseg": "paddleseg_r50"}
    return write_file(
        name, small(listed_in_others(listed.get(layout, "official_r101")), classes), folder
    )
