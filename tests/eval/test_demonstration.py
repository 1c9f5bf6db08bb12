"""``python -m emanet_triton.eval`` without arguments: the first thing a new user runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kills import TORCHRUN

import emanet_triton
from emanet_triton import create_model, fuse, segment
from emanet_triton.data.cityscapes import CITYSCAPES, to_label_ids
from emanet_triton.data.png import read_image, read_label_png
from emanet_triton.data.scenes.generate import demo_dataset
from emanet_triton.eval.__main__ import main
from emanet_triton.eval.plan import Job
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import ZOO


def test_it_segments_and_the_attention_is_worth_it(capsys, tmp_path):
    out = tmp_path / "out.json"
    assert main(["--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["images"] == 40
    assert report["mIoU"] >= 70
    assert None not in report["IoU"].values()
    rows = [
        line.split("|") for line in capsys.readouterr().out.splitlines() if "emanet_demo" in line
    ]
    with_attention, without = (float(row[6]) for row in rows)
    assert "no reconstruction" in rows[1][1]
    assert with_attention == round(report["mIoU"], 2)
    assert with_attention - without > 5


def test_the_ablations_tensor_is_on_the_networks_device():
    path = Path(emanet_triton.__file__).parent / "models/weights/emanet_demo.pth"
    job = Job(DEMO, read_checkpoint(path), ZOO[DEMO].protocol, ms_flip=False, reconstruct=False)
    fixed = job.load(torch.device("meta")).decode_head.fixed_reconstruction
    assert fixed.device.type == "meta"


def test_it_says_what_it_is(capsys):
    assert main(["--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert "This was a demonstration" in out
    assert "say nothing about Cityscapes" in out
    assert "--ckpt emanet_r50-d8_512x1024_80k_cityscapes" in out


def test_pictures_are_of_the_network_and_not_of_its_ablation(tmp_path):
    assert main(["--limit", "1", "--save-predictions", str(tmp_path)]) == 0
    (saved,) = tmp_path.iterdir()
    sample = CITYSCAPES.find_samples(demo_dataset(), limit=1)[0]
    model = fuse(create_model("emanet_demo", pretrained=True))
    labels = segment(model, read_image(sample.image))
    assert (read_label_png(saved) == to_label_ids(labels)).all()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_torchrun(tmp_path, processes):
    out = tmp_path / "out.json"
    command = ["-m", "emanet_triton.eval", "--ckpt", "emanet_demo", "--limit", "3"]
    subprocess.run(
        [sys.executable, *TORCHRUN, processes, *command, "--json", str(out)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    got = json.loads(out.read_text())["confusion"]
    single = tmp_path / "single.json"
    assert main(["--ckpt", "emanet_demo", "--limit", "3", "--json", str(single)]) == 0
    assert got == json.loads(single.read_text())["confusion"]
