"""A file with the exact structure of a published checkpoint, from disk to the table.

The published files themselves are not at hand: this one has their keys, shapes, dtypes, form and
name, and the weights with which mmsegmentation computed the golden labels.
"""

import json
from collections import OrderedDict
from dataclasses import replace

import golden_data
import numpy as np
import pytest
import torch

from emanet_triton.data.png import write_png
from emanet_triton.eval.__main__ import main
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.zoo import ZOO

NAME = "emanet_r50-d8_769x769_80k_cityscapes"


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
def test_golden_labels_are_scored_as_perfect(tmp_path, monkeypatch, ms_flip):
    golden, entry = golden_data.vectors(NAME), ZOO[NAME]
    content = {
        "meta": {
            "mmseg_version": "0.6.0",
            "CLASSES": ("road", "sidewalk"),
            "config": "model = ...",
        },
        "state_dict": OrderedDict(golden_data.golden_state_dict(NAME)),
    }
    temporary = tmp_path / "checkpoint"
    torch.save(content, temporary, _use_new_zipfile_serialization=False)  # as in 2020
    sha256 = read_checkpoint(temporary).sha256[:8]
    checkpoint = tmp_path / entry.file.replace(entry.sha256, sha256)
    temporary.rename(checkpoint)
    monkeypatch.setitem(
        ZOO,
        NAME,
        replace(
            entry,
            file=checkpoint.name,
            sha256=sha256,
            protocol=golden_data.golden_model(NAME).protocol,
        ),
    )
    label = golden["label_ms_flip" if ms_flip else "label"]
    city = tmp_path / "cityscapes"
    for path, pixels in (
        (city / "leftImg8bit/val/bonn/bonn_000000_000019_leftImg8bit.png", golden["image"]),
        (city / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelTrainIds.png", label),
    ):
        path.parent.mkdir(parents=True)
        write_png(path, pixels.astype(np.uint8))
    out = tmp_path / "out.json"
    command = ["--ckpt", str(checkpoint), "--data", str(city), "--json", str(out)]
    if ms_flip:  # 154 windows: one by one, each would read all weights anew
        command += ["--ms-flip", "--batch-size", "64"]
    assert main(command) == 0
    report = json.loads(out.read_text())
    assert report["model"] == NAME
    assert report["sha256"].startswith(sha256)
    # The rest are pixels whose two best classes are nearly equal; rounding decides there.
    assert report["aAcc"] > 99.9
    classes = {i for i, iou in enumerate(report["IoU"].values()) if iou is not None}
    assert classes >= set(np.unique(label).tolist())
