"""A training on a small tree in Pascal VOC's layout, and an evaluation of its weights."""

from dataclasses import replace

import tiny_eval
from public_sets import write
from small_trainings import options

from emanet_triton.data.voc import VOC2012
from emanet_triton.eval.__main__ import main as evaluate
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import Description
from emanet_triton.models.zoo import ZOO
from emanet_triton.train.__main__ import main

NAME = "emanet_voc"


def test_the_data_set_of_the_model_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ZOO, NAME, replace(ZOO[tiny_eval.NAME], file="voc.pth", dataset=VOC2012))
    root, out = tmp_path / "VOC2012", tmp_path / "out"
    write(VOC2012, root, "a", "b", "c", split="train", size=(48, 64))
    write(VOC2012, root, "d", split="val", size=(48, 64))
    changed = {"model": NAME, "init": "none", "iterations": 1, "scale": "64x48"}
    assert main(options(root, out=out, **changed)) == 0
    assert "validation after iteration 1: mIoU" in capsys.readouterr().out
    trained = Description.of(read_checkpoint(out / "last.safetensors").meta)
    assert trained.classes[:2] == ("background", "aeroplane")
    assert len(trained.classes) == 21
    assert evaluate(["--ckpt", str(out / "last.safetensors"), "--data", str(root)]) == 0
    assert "tvmonitor" in capsys.readouterr().out
