"""The command line from end to end: its output and its files."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tiny_eval
import torch
from tiny_eval import expected_confusion, run

from emanet_triton import fuse, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import read_image
from emanet_triton.eval import metric
from emanet_triton.eval.__main__ import main
from emanet_triton.inference import build
from emanet_triton.kernels import choice
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import ZOO

FIELDS = [
    "model",
    "checkpoint",
    "sha256",
    "dataset",
    "description",
    "data",
    "split",
    "images",
    "protocol",
    "ms_flip",
    "precision",
    "device",
    "network",
    "calibration",
    "versions",
    "seconds",
    "unscored",
    "mIoU",
    "mAcc",
    "aAcc",
    "IoU",
    "Acc",
    "confusion",
    "compared",
    "published",
]


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
def test_json_has_every_figure(tmp_path, city, ckpt, ms_flip):
    got = run(tmp_path, city, ckpt, *["--ms-flip"] * ms_flip)
    assert list(got) == FIELDS
    assert got["confusion"] == expected_confusion(city, ms_flip)
    scores = metric.scores(torch.tensor(got["confusion"]))
    assert (got["mIoU"], got["mAcc"], got["aAcc"]) == (scores.miou, scores.macc, scores.aacc)
    names = [c.name for c in CITYSCAPES.classes]
    assert got["IoU"] == dict(zip(names, scores.iou, strict=True))
    assert got["Acc"] == dict(zip(names, scores.acc, strict=True))
    assert (got["dataset"], got["description"], got["unscored"]) == ("Cityscapes", None, None)
    assert got["model"] == "tiny"
    assert got["images"] == 6
    assert got["ms_flip"] is ms_flip
    assert got["published"] is None  # the file is not the published one
    assert got["protocol"]["base_scale"] == [64, 32]


@pytest.mark.parametrize("few", [7, 6])
def test_for_few_images_no_convolution_is_measured(tmp_path, city, ckpt, monkeypatch, few):
    monkeypatch.setattr(build, "FEW_IMAGES", few)
    may_measure = []

    def fuse(model, dtype):
        may_measure.append(choice._MAY_MEASURE.get())
        return verified_fuse(model, dtype)

    monkeypatch.setattr(build, "verified_fuse", fuse)
    assert run(tmp_path, city, ckpt)["images"] == 6
    assert may_measure == [few == 6]
    assert choice._MAY_MEASURE.get()


def test_the_plain_network(tmp_path, city, ckpt, capsys):
    got = run(tmp_path, city, ckpt, "--no-fuse")
    assert "plain network, fp32 on cpu, " in capsys.readouterr().err
    assert got["network"] == "plain"
    assert got["confusion"] == expected_confusion(city, fused=False)


def test_printed_tables(tmp_path, city, ckpt, capsys, threads):
    got = run(tmp_path, city, ckpt, "--threads", "1")
    out, err = capsys.readouterr()
    assert out.count("\n") == 25
    assert f"{got['IoU']['bicycle']:.2f}" in out
    assert f"| {got['mIoU']:.2f}" in out
    assert "mmseg-0.x, whole, one view\n" in err
    assert "fused network, fp32 on cpu, 1 thread, one input at once\n" in err
    assert "images a second; " in err
    assert f"mIoU {got['mIoU']:.2f}" in err  # the progress bar's last figure


@pytest.mark.parametrize(
    ("published", "verdict"), [(0.0, "NO"), (None, "yes")], ids=["far", "reproduced"]
)
def test_published_row(tmp_path, city, ckpt, capsys, monkeypatch, published, verdict):
    first = run(tmp_path, city, ckpt)
    figure = round(first["mIoU"], 2) if published is None else published
    entry = ZOO["tiny"]
    figures = type(entry.published)(figure, 99.0, 1.0, 1.0)
    dataset = replace(entry.dataset, published_on=("val", 6))
    known = replace(entry, sha256=first["sha256"][:8], published=figures, dataset=dataset)
    monkeypatch.setitem(ZOO, "tiny", known)
    capsys.readouterr()
    got = run(tmp_path, city, ckpt)
    difference = got["mIoU"] - figure
    assert got["published"] == {
        "mIoU": figure,
        "difference": difference,
        "within_tolerance": published is None,
    }
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[-3:] == [f"{figure:.2f}", f"{difference:+.2f}", verdict]
    # The published figure is for the whole split and the published protocol, whose version matters
    # for ms+flip only.
    version = "--protocol", "mmseg-1.x"
    assert run(tmp_path, city, ckpt, *version)["published"] == got["published"]
    for options in (["--limit", "5"], [*version, "--ms-flip"]):
        assert run(tmp_path, city, ckpt, *options)["published"] is None


def test_two_precisions_in_one_pass(tmp_path, city, ckpt, capsys):
    single = run(tmp_path, city, ckpt)
    half = run(tmp_path, city, ckpt, "--precision", "bf16")
    capsys.readouterr()
    both = run(tmp_path, city, ckpt, "--precision", "bf16", "--compare", "fp32")
    out, err = capsys.readouterr()
    compared = both["compared"]
    assert both["confusion"] == half["confusion"]
    assert compared["confusion"] == single["confusion"]
    assert compared["precision"] == "fp32"
    assert compared["mIoU"] == single["mIoU"]
    assert compared["difference"] == half["mIoU"] - single["mIoU"]
    agreement = np.array(compared["agreement"])
    assert agreement.sum() == 6 * 32 * 64  # every pixel, scored or not
    assert compared["labels_agree"] == pytest.approx(100 * agreement.trace() / agreement.sum())
    assert 90 < compared["labels_agree"] < 100
    assert "compared with fp32" in err
    assert f"{compared['difference']:+.4f}" in out
    assert f"{compared['labels_agree']:.4f}%" in out


def test_saved_predictions_are_label_ids_under_the_servers_names(tmp_path, city, ckpt):
    folder = tmp_path / "predictions"
    run(tmp_path, city, ckpt, "--save-predictions", str(folder), "--limit", "2")
    samples = CITYSCAPES.find_samples(city, limit=2)
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{s.name}_leftImg8bit.png" for s in samples
    ]
    for sample in samples:
        ids = cv2.imread(str(folder / f"{sample.name}_leftImg8bit.png"), cv2.IMREAD_UNCHANGED)
        want = segment(fuse(tiny_eval.tiny_network()), read_image(sample.image))
        np.testing.assert_array_equal(ids, CITYSCAPES.to_stored_ids(want))


def test_saved_overlays(tmp_path, city, ckpt):
    folder = tmp_path / "overlays"
    run(tmp_path, city, ckpt, "--save-overlays", str(folder), "--limit", "1")
    (path,) = folder.iterdir()
    assert read_image(path).shape[1] > 2 * tiny_eval.SIZE[1]


@pytest.mark.parametrize("size", ["2", "4"])
def test_batches_count_every_image_once(tmp_path, city, ckpt, size):
    got = run(tmp_path, city, ckpt, "--batch-size", size)
    want = np.array(expected_confusion(city))
    assert np.sum(got["confusion"]) == want.sum()
    assert np.abs(np.array(got["confusion"]) - want).sum() <= 4  # rounding, at near-ties


def test_all_gives_one_table(tmp_path, city, capsys, monkeypatch):
    published = {}
    for i in range(2):
        weights = tiny_eval.write_checkpoint(tmp_path, f"published{i}.pth")
        sha256 = run(tmp_path, city, weights, "--model", "tiny", "--limit", "1")["sha256"]
        published[f"tiny{i}"] = replace(
            ZOO["tiny"], source="mmseg", file=weights.name, sha256=sha256[:8], url="http://"
        )
    monkeypatch.setattr("emanet_triton.models.zoo.ZOO", published)
    monkeypatch.setattr("emanet_triton.eval.plan.ZOO", published)
    out = tmp_path / "all.json"
    capsys.readouterr()
    command = ["--all", "--ckpt", str(tmp_path), "--data", str(city), "--json", str(out)]
    assert main(command) == 0
    reports = json.loads(out.read_text())
    runs = [(r["model"], r["ms_flip"]) for r in reports]
    assert runs == [("tiny0", False), ("tiny1", False), ("tiny0", True), ("tiny1", True)]
    assert reports[0]["confusion"] == reports[1]["confusion"] == expected_confusion(city)
    assert reports[2]["confusion"] == expected_confusion(city, ms_flip=True)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
