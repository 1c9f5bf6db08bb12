"""Files with the exact keys of other projects' published files, from disk to the table.

The published files are not at hand: these have their keys, shapes, dtypes and containers. The
labels are those that the plain network and the plain sequence of operations give.
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import checkpoint_files
import golden_data
import numpy as np
import pytest
import torch
from checkpoint_files import Listed, listed_in_others, small, with_blocks, with_classes
from other_golden import weights_of
from public_sets import label, places, write

from emanet_triton import Dataset, create_model, list_models
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import write_png
from emanet_triton.data.public import DATASETS
from emanet_triton.data.voc import VOC2012
from emanet_triton.eval.__main__ import main
from emanet_triton.inference import reference
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


def expected_labels(path: Path, name: str, image: np.ndarray, ms_flip: bool) -> np.ndarray:
    """Train ids by the plain network and the plain sequence of operations."""
    model = create_model(name, checkpoint=path)
    with torch.no_grad():
        found = reference.probabilities(model, [image], model.protocol, ms_flip)
    return found[0].argmax(0).numpy().astype(np.uint8)


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


@pytest.mark.parametrize("name", FILES)
def test_from_the_file_to_the_table(name, tmp_path, monkeypatch, capsys):
    entry = replace(ZOO[name], protocol=smaller(ZOO[name].protocol))
    monkeypatch.setitem(ZOO, name, entry)
    path = write_file(name, FILES[name](), tmp_path)
    root, dataset = write_tree(entry.dataset, tmp_path / "set", "a"), entry.dataset
    (sample,) = dataset.find_samples(root)
    want = expected_labels(path, name, dataset.read(sample)[0], ms_flip=False)
    assert len(np.unique(want)) > 1
    if dataset is CITYSCAPES:
        write_png(city_places(root, "a")[1], want)
    else:
        label(dataset, places(dataset, root, "a")[1], dataset.to_stored_ids(want))
    out = tmp_path / "out.json"
    assert main(["--ckpt", str(path), "--data", str(root), "--json", str(out)]) == 0
    got = json.loads(out.read_text())
    assert (got["model"], got["network"], got["images"]) == (name, "fused", 1)
    assert list(got["IoU"]) == [each.name for each in dataset.classes]
    assert got["aAcc"] > 99.9  # the rest are pixels whose two best classes are nearly equal
    assert entry.protocol.version in capsys.readouterr().err


def test_all_of_a_project_on_one_data_set(tmp_path, monkeypatch, capsys):
    """The four networks of sssegmentation for Pascal VOC, small, each with its own file."""
    voc = replace(VOC2012, published_on=("val", 2))
    monkeypatch.setitem(DATASETS, "voc2012", voc)
    names = [f"emanet_resnet{b}_voc" for b in ("50os8", "50os16", "101os8", "101os16")]
    sizes = {"blocks": (1, 1, 1, 1), "base_channels": 8, "ema_channels": 64, "num_bases": 8}
    for name in names:
        entry = ZOO[name]
        architecture = replace(entry.architecture, **sizes, head_channels=64)
        protocol = replace(smaller(entry.protocol), ratios=(0.5, 1.0))
        monkeypatch.setitem(
            ZOO, name, replace(entry, architecture=architecture, protocol=protocol, dataset=voc)
        )
        write_file(name, small(listed_in_others("sssegmentation_r50os8"), 21), tmp_path)
    root = write_tree(VOC2012, tmp_path / "set", "a", "b")
    out = tmp_path / "all.json"
    command = ["--all", "sssegmentation", "--ckpt", str(tmp_path), "--data", str(root)]
    assert main([*command, "--json", str(out)]) == 0
    reports = json.loads(out.read_text())
    assert [(r["model"], r["ms_flip"]) for r in reports] == [
        (name, ms_flip) for ms_flip in (False, True) for name in names
    ]
    published = [r["published"] and r["published"]["mIoU"] for r in reports]
    assert published == [75.29, 74.86, 76.43, 76.19, None, None, None, None]
    assert reports[0]["confusion"] != reports[1]["confusion"]  # output strides 8 and 16
    assert reports[0]["confusion"] != reports[4]["confusion"]
    table = capsys.readouterr().out
    assert all(figure in table for figure in ("75.29", "74.86", "76.43", "76.19"))
    assert all((tmp_path / f"{name}.pth.sha256").exists() for name in names)


def test_drivable_areas_need_their_name_where_both_lie(tmp_path, capsys):
    for dataset in (BDD100K, BDD100K_DRIVABLE):
        write(dataset, tmp_path, "a")
    command = ["--all", "bdd100k", "--data", str(tmp_path)]
    assert main(command) == 2
    assert "has the folders of bdd100k and bdd100k-drivable; expected the root of one of" in (
        capsys.readouterr().err
    )
    assert main([*command, "--dataset", "bdd100k-drivable", "--ckpt", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    for name in list_models(dataset="bdd100k-drivable"):
        assert f"{tmp_path / name}.pth: no such file" in error


def test_a_file_of_one_project_for_the_model_of_another(tmp_path, capsys):
    name = "emanet_resnet50_os8_cityscapes_1024x512_80k"
    path = write_file(name, small(listed_in_others("paddleseg_r50"), 19), tmp_path)
    root = write_tree(CITYSCAPES, tmp_path / "set", "a")
    model = "emanet_r50-d8_512x1024_80k_cityscapes"
    assert main(["--data", str(root), "--ckpt", str(path), "--model", model]) == 2
    assert f"is a checkpoint of {name}, not of --model {model}" in capsys.readouterr().err
    renamed = path.rename(tmp_path / "mine.pdparams")
    assert main(["--data", str(root), "--ckpt", str(renamed), "--model", model]) == 2
    assert "is a checkpoint of PaddleSeg, but the model is one of mmsegmentation" in (
        capsys.readouterr().err
    )
    assert main(["--data", str(root), "--ckpt", str(renamed)]) == 2
    assert f"expected --model with one of: {name}, " in capsys.readouterr().err
