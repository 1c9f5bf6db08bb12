"""Every command takes the models of every project: small networks, each with its own file."""

import cv2
import numpy as np
import pytest
import torch
from other_sources import SIZE, small_entry, write_small_file
from public_sets import write
from small_trainings import options

from emanet_triton import create_model, fuse, overlay, segment
from emanet_triton.data.png import read_image, read_label_png
from emanet_triton.data.voc import VOC2012
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import Description
from emanet_triton.models.entries import OFFICIAL
from emanet_triton.models.zoo import ZOO, published_path
from emanet_triton.predict.__main__ import main as predict
from emanet_triton.train.__main__ import main as train
from emanet_triton.web.segmenter import Choice, Segmenter

NAMES = (
    "emanet_r50-d8_512x1024_40k_drivable_bdd100k",
    "emanet_resnet50os16_voc",
    "emanet_r101_voc_official",
    "emanet_resnet50_os8_voc12aug_512x512_40k",
)


@pytest.fixture(params=NAMES)
def name(request, monkeypatch):
    """A model whose file lies in torch's hub cache, so that nothing is downloaded."""
    monkeypatch.setitem(ZOO, request.param, small_entry(request.param))
    folder = published_path(request.param).parent
    folder.mkdir(parents=True)
    write_small_file(request.param, folder)
    return request.param


@pytest.fixture
def image():
    return np.random.default_rng(2).integers(0, 256, (40, 56, 3), np.uint8)


def test_predict_and_the_page_give_the_labels_of_segment(name, image, tmp_path):
    network = fuse(create_model(name, pretrained=True))
    want = segment(network, image)
    assert len(np.unique(want)) > 1
    cv2.imwrite(str(tmp_path / "a.png"), image[..., ::-1])
    command = [str(tmp_path / "a.png"), "--ckpt", name, "--out", str(tmp_path / "out")]
    assert predict([*command, "--save", "labels,overlay", "--train-ids"]) == 0
    np.testing.assert_array_equal(read_label_png(tmp_path / "out" / "a_labels.png"), want)
    drawn = overlay(image, want, ZOO[name].dataset)
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "a_overlay.png"), drawn)

    shown = Segmenter(torch.device("cpu"))(image, Choice(name))
    assert (shown.dataset, shown.network) == (ZOO[name].dataset, "fused")
    np.testing.assert_array_equal(shown.labels, want)


def test_a_training_begins_with_the_published_weights(name, tmp_path):
    root, out = tmp_path / "set", tmp_path / "out"
    for split in ("train", "val"):
        write(ZOO[name].dataset, root, "a", "b", split=split, size=SIZE)
    assert train(options(root, out=out, model=None, init=name, iterations=1, val_split="none")) == 0
    trained = read_checkpoint(out / "last.safetensors")
    assert Description.of(trained.meta).model == name
    before = create_model(name, pretrained=True).state_dict()
    key = "decode_head.conv_seg.weight"
    difference = (trained.state_dict[key] - before[key]).norm() / before[key].norm()
    assert 0 < difference < 0.5


def test_a_training_without_its_weights_leaves_no_folder(tmp_path, capsys):
    root, out = tmp_path / "set", tmp_path / "out"
    write(VOC2012, root, "a", split="train", size=SIZE)
    assert train(options(root, out=out, model=None, init=OFFICIAL, val_split="none")) == 2
    assert "no such file; expected the checkpoint of emanet_r101_voc" in capsys.readouterr().err
    assert not out.exists()
