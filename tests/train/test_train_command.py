"""``python -m emanet_triton.train`` in this process: what it writes, prints and draws."""

import csv
import json

import numpy as np
import pytest
import torch
from small_trainings import options

from emanet_triton.data.png import read_image
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import Description
from emanet_triton.models.loading import load_into
from emanet_triton.models.zoo import create_model
from emanet_triton.train.__main__ import main


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """The folder of a training that nobody disturbed."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(options(scenes, out=out, keep_every=3)) == 0
    return out


def test_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "best.safetensors",
        "iter_3.safetensors",
        "last.safetensors",
        "state.pth",
        "train.csv",
        "val.csv",
    }


def test_the_log(trained):
    log = rows(trained / "train.csv")
    assert [row["iteration"] for row in log] == ["2", "4"]
    for row in log:
        total, main_loss, auxiliary = (float(row[key]) for key in ("loss", "main", "auxiliary"))
        assert total == pytest.approx(main_loss + 0.4 * auxiliary, rel=1e-4)
        assert 0 <= float(row["accuracy"]) <= 100
        assert float(row["images/s"]) > 0
        assert float(row["memory MB"]) > 100
    assert float(log[0]["lr"]) > float(log[1]["lr"])
    scores = rows(trained / "val.csv")
    assert [row["iteration"] for row in scores] == ["2", "4"]
    assert all(0 < float(row["mIoU"]) < 100 for row in scores)
    assert {"road", "bicycle"} <= scores[0].keys()


def test_lines(scenes, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(options(scenes, out=out)) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("iteration")]
    assert len(lines) == 2
    assert lines[0].startswith("iteration 2/4  loss ")
    for part in ("main", "auxiliary", "accuracy", "lr", "images/s", "MB", "left"):
        assert part in lines[0]
    assert sum(line.startswith("validation after iteration") for line in printed) == 2
    assert any(line.startswith("| road ") for line in printed)
    assert printed[-3].startswith("best mIoU ")
    assert printed[-2] == f"last weights: {out / 'last.safetensors'}"
    assert printed[-1].endswith(f"predict --ckpt {out / 'best.safetensors'} PICTURE")


def test_the_best_and_the_last_weights(trained):
    best, last = (read_checkpoint(trained / f"{name}.safetensors") for name in ("best", "last"))
    scores = {int(row["iteration"]): float(row["mIoU"]) for row in rows(trained / "val.csv")}
    state = torch.load(trained / "state.pth", weights_only=True)
    miou, iteration = state["best"]
    assert miou == pytest.approx(max(scores.values()), rel=1e-5)
    assert scores[iteration] == max(scores.values())
    network = state["trainer"]["network"]
    assert all(torch.equal(last.state_dict[key], network[key]) for key in network)
    for checkpoint in (best, last):
        load_into(create_model("emanet_demo"), checkpoint)
    assert state["trainer"]["iteration"] == 4


def test_the_initial_weights_are_those_of_init(scenes, tmp_path):
    tiny = {"iterations": 1, "lr": 1e-30, "min_lr": 1e-30, "val_split": "none"}
    assert main(options(scenes, out=tmp_path / "out", **tiny)) == 0
    weights = read_checkpoint(tmp_path / "out" / "last.safetensors").state_dict
    shipped = create_model("emanet_demo", pretrained=True).state_dict()
    for key, value in shipped.items():
        if key.endswith(("weight", "bias")):
            assert torch.equal(weights[key], value), key
    assert not (tmp_path / "out" / "best.safetensors").exists()


def test_a_backbone_file(scenes, tmp_path, capsys):
    shipped = create_model("emanet_demo", pretrained=True).state_dict()
    backbone = {k.partition(".")[2]: v for k, v in shipped.items() if k.startswith("backbone.")}
    backbone["fc.weight"] = torch.zeros(10, 384)  # as OpenMMLab's files have it
    path = tmp_path / "resnet.pth"
    torch.save({"state_dict": backbone}, path)
    tiny = {
        "iterations": 1,
        "lr": 1e-30,
        "min_lr": 1e-30,
        "val_split": "none",
        "init": None,
        "seed": 5,
    }
    assert main(options(scenes, out=tmp_path / "out", backbone=path, **tiny)) == 0
    checkpoint = read_checkpoint(tmp_path / "out" / "last.safetensors")
    for key, value in shipped.items():
        same = torch.equal(checkpoint.state_dict[key], value)
        if key.endswith(".weight") and "bn" not in key:
            assert same == key.startswith("backbone."), key
    assert Description.of(checkpoint.meta).info["init"] == "resnet.pth"
    assert "fc" in capsys.readouterr().err


def test_the_end_is_saved_whatever_the_intervals(scenes, tmp_path):
    rare = {"iterations": 3, "save_every": 1000, "keep_every": 1000, "val_split": "none"}
    assert main(options(scenes, out=tmp_path, **rare)) == 0
    state = torch.load(tmp_path / "state.pth", weights_only=True)
    assert state["trainer"]["iteration"] == 3
    assert (tmp_path / "last.safetensors").exists()


def test_random_weights_depend_on_the_seed(scenes, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        tiny = {"iterations": 1, "val_split": "none", "init": "none", "seed": seed}
        assert main(options(scenes, out=out, **tiny)) == 0
        found.append((out / "last.safetensors").read_bytes())
    weights = [read_checkpoint(tmp_path / str(n) / "last.safetensors").state_dict for n in range(3)]
    key = "backbone.stem.0.weight"
    assert found[0] == found[1]
    assert not torch.equal(weights[0][key], weights[2][key])


def test_averaged_weights_are_saved_and_validated(scenes, tmp_path):
    assert main(options(scenes, out=tmp_path, ema=0.9)) == 0
    weights = read_checkpoint(tmp_path / "last.safetensors").state_dict
    shipped = create_model("emanet_demo", pretrained=True).state_dict()
    key = "backbone.layer4.0.conv1.weight"
    state = torch.load(tmp_path / "state.pth", weights_only=True)["trainer"]
    assert not torch.equal(state["network"][key], shipped[key])
    # AveragedModel copies the weights of the first iteration and averages from the second on.
    assert torch.equal(weights[key], state["averaged"][f"module.{key}"])


def test_dry_run(scenes, tmp_path, capsys):
    assert main([*options(scenes, out=tmp_path / "out"), "--dry-run"]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.png"]
    picture = read_image(tmp_path / "out" / "samples.png")
    assert picture.shape[0] > 4 * 32
    assert picture.shape[1] >= 4 * 64
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    printed = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "kept for the backward pass", "peak"):
        assert f"| {part}" in printed


def test_options_that_change_the_weights(scenes, tmp_path):
    """Each is a way to train that leads to other weights than the usual one."""
    ways = {
        "usual": {},
        "optimizer": {"optimizer": "adamw"},
        "accumulate": {"accumulate": 2},
        "warmup": {"warmup": 3},
        "class-balance": {"class_balance": 0.5},
        "colors": {"no_colors": True},
        "dropout": {"dropout": 0},
        "precision": {"precision": "bf16"},
    }
    found = {}
    for name, changed in ways.items():
        out = tmp_path / name
        assert main(options(scenes, out=out, iterations=1, val_split="none", **changed)) == 0
        weights = read_checkpoint(out / "last.safetensors").state_dict
        found[name] = weights["decode_head.conv_seg.weight"].numpy().tobytes()
    assert len(set(found.values())) == len(ways)


def test_metadata(trained):
    meta = read_checkpoint(trained / "last.safetensors").meta
    told = json.dumps(dict(meta))
    for part in ("emanet_demo", "iteration", "road", "torch"):
        assert part in told
