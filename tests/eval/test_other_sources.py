"""Files with the exact keys of other projects' published files, from disk to the table.

The published files are not at hand: these have their keys, shapes, dtypes and containers. The
labels are those that the plain network and the plain sequence of operations give.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import listed_in_others, small
from other_sources import FILES, city_places, smaller, write_file, write_tree
from public_sets import label, places, write

from emanet_triton import create_model, list_models
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import write_png
from emanet_triton.data.public import DATASETS
from emanet_triton.data.voc import VOC2012
from emanet_triton.eval.__main__ import main
from emanet_triton.inference import reference
from emanet_triton.models.zoo import ZOO


def expected_labels(path: Path, name: str, image: np.ndarray, ms_flip: bool) -> np.ndarray:
    """Train ids by the plain network and the plain sequence of operations."""
    model = create_model(name, checkpoint=path)
    with torch.no_grad():
        found = reference.probabilities(model, [image], model.protocol, ms_flip)
    return found[0].argmax(0).numpy().astype(np.uint8)


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
