"""Evaluations on small trees of Pascal VOC 2012, ADE20K and BDD100K, from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_eval
import torch
from public_sets import SETS, legal_ids, write

from emanet_triton import segment
from emanet_triton.data.bdd100k import BDD100K_DRIVABLE
from emanet_triton.data.dataset import IGNORE
from emanet_triton.data.png import read_image, read_label_png
from emanet_triton.eval.__main__ import main
from emanet_triton.eval.metric import scores
from emanet_triton.models.zoo import ZOO

NAME = "emanet_public"


@pytest.mark.parametrize("dataset", SETS, ids=lambda dataset: dataset.name)
def test_scores_predictions_and_overlays(dataset, tmp_path, monkeypatch):
    classes = len(dataset.classes)
    ckpt = tiny_eval.write_checkpoint(tmp_path, "public.pth", num_classes=classes)
    monkeypatch.setitem(ZOO, NAME, replace(ZOO["tiny"], file=ckpt.name, dataset=dataset))
    root = write(dataset, tmp_path / "set", "a", "b", size=(32, 64))
    out, predictions, overlays = (tmp_path / name for name in ("out.json", "labels", "overlays"))
    command = ["--ckpt", str(ckpt), "--data", str(root), "--json", str(out), "--no-fuse"]
    command += ["--save-predictions", str(predictions), "--save-overlays", str(overlays)]
    assert main(command) == 0

    model, want = tiny_eval.tiny_network(classes), np.zeros((classes, classes), int)
    for sample in dataset.find_samples(root):
        image, label = dataset.read(sample)
        predicted = segment(model, image)
        np.add.at(want, (label[label != IGNORE], predicted[label != IGNORE]), 1)
        saved = read_label_png(predictions / f"{sample.name}.png")
        np.testing.assert_array_equal(saved, legal_ids(dataset)[predicted])
        assert read_image(overlays / f"{sample.name}.png").shape[1] >= 2 * 320
    got = json.loads(out.read_text())
    assert got["confusion"] == want.tolist()
    assert got["images"] == 2
    assert list(got["IoU"]) == [each.name for each in dataset.classes]
    assert got["mIoU"] == scores(torch.tensor(want), dataset.unscored).miou
    assert got["dataset"] == dataset.name
    assert got["unscored"] == dataset.unscored
    if dataset is BDD100K_DRIVABLE:
        assert got["IoU"]["background"] is None
        assert got["Acc"]["background"] is None
