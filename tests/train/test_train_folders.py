"""What the folder of ``--out`` may hold when a training begins or goes on."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_trainings import options

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import read_image, write_png
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.description import Description
from emanet_triton.train.__main__ import main
from emanet_triton.train.run import _check_origin

FIVE = Path(__file__).parents[2] / "demo" / "five.toml"


def weights(folder):
    return (folder / "last.safetensors").read_bytes()


@pytest.fixture
def out(scenes, tmp_path):
    assert main(options(scenes, out=tmp_path / "out", iterations=2)) == 0
    return tmp_path / "out"


def test_a_training_is_not_overwritten(scenes, out, fails):
    before = weights(out)
    said = fails(*options(scenes, out=out))
    assert f"--out {out}: holds a training; expected --resume" in said
    assert weights(out) == before


def test_nothing_to_resume_is_found_before_the_data_set_is_read(tmp_path, fails):
    said = fails(*options(tmp_path / "no data", out=tmp_path / "out", resume=True))
    assert f"--resume: {tmp_path / 'out' / 'state.pth'}: no such file; expected" in said
    assert not (tmp_path / "out").exists()


def test_other_settings(scenes, out, fails):
    said = fails(*options(scenes, out=out, resume=True, lr=0.5, iterations=2))
    assert "--resume: the settings differ: --lr 0.001 before, 0.5 now" in said


@pytest.mark.parametrize("option", ["init", "backbone"])
def test_other_initial_weights(scenes, out, fails, option):
    other = out / "last.safetensors"
    again = {"resume": True, "iterations": 2, "init": None, option: other}
    named = other if option == "init" else other.name
    said = fails(*options(scenes, out=out, **again))
    assert f"--resume: the training began with the weights emanet_demo, not {named}; " in said
    assert said.endswith("expected the same --init or --backbone, or --model alone")


def test_the_same_initial_weights_by_another_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for same in ("w.pth", "./w.pth", str(tmp_path / "w.pth")):
        _check_origin("w.pth", same)
    with pytest.raises(InputError, match=r"began with the weights w\.pth, not x/w\.pth; "):
        _check_origin("w.pth", "x/w.pth")


def test_other_images(scenes, out, fails, own_scenes):
    CITYSCAPES.find_samples(own_scenes, "train")[0].label.unlink()
    next(own_scenes.rglob("*000000_leftImg8bit.png")).unlink()
    said = fails(*options(own_scenes, out=out, resume=True, iterations=2))
    assert "--data 6 images to train on, 2 to validate" in said
    assert "5 images to train on, 2 to validate" in said


def test_another_validation(scenes, out, fails):
    said = fails(*options(scenes, out=out, resume=True, iterations=2, val_split="train"))
    assert "6 images to train on, 6 to validate" in said


def test_other_ids(scenes, tmp_path, fails):
    data = tmp_path / "five.toml"
    text = FIVE.read_text().replace('root = "scenes"', f'root = "{scenes}"')
    data.write_text(text)
    assert main(options(data, out=tmp_path / "five", iterations=2)) == 0
    data.write_text(text.replace("ids = [7, 8]", "ids = [7]").replace("[0, 1,", "[8, 0, 1,"))
    said = fails(*options(data, out=tmp_path / "five", iterations=2, resume=True))
    assert "--resume: the settings differ: --data 6 images" in said


def test_the_initial_weights_keep_their_name(scenes, out):
    """They are told when the training begins; later they are not read."""
    again = {"resume": True, "iterations": 2, "init": None}
    (out / "best.safetensors").unlink()
    state = torch.load(out / "state.pth", weights_only=True)
    torch.save(state | {"validated": -1, "best": None}, out / "state.pth")
    assert main(options(scenes, out=out, **again)) == 0
    best = read_checkpoint(out / "best.safetensors")
    assert Description.of(best.meta).info["init"] == "emanet_demo"
    rows = (out / "val.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["iteration", "2"]  # not twice


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\x03\x04"])
def test_a_damaged_state(scenes, out, fails, content):
    (out / "state.pth").write_bytes(content)
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert f"{out / 'state.pth'}: cannot be read" in said


def test_one_damaged_byte_of_the_weights(scenes, out, fails):
    damaged = bytearray((out / "state.pth").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "state.pth").write_bytes(damaged)
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert f"{out / 'state.pth'}: cannot be read, it is damaged" in said


def test_a_state_that_is_no_pickle(scenes, out, fails):
    """Its checksums are right, but reading it takes from an empty stack."""
    state = out / "state.pth"
    with zipfile.ZipFile(state) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(state, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, b"\x80\x02R." if name.endswith("data.pkl") else content)
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert f"{state}: cannot be read, it is damaged" in said


def test_a_truncated_state(scenes, out, fails):
    whole = (out / "state.pth").read_bytes()
    (out / "state.pth").write_bytes(whole[: len(whole) // 2])
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert f"{out / 'state.pth'}: cannot be read" in said


@pytest.mark.parametrize(
    "lacking", [{"form": 1}, {"optimizer": {}}, {"network": {}}], ids=lambda d: next(iter(d))
)
def test_an_incomplete_state(scenes, out, fails, lacking):
    state = torch.load(out / "state.pth", weights_only=True)
    if "form" in lacking:
        state = lacking
    else:
        state["trainer"] |= lacking
    torch.save(state, out / "state.pth")
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert f"{out / 'state.pth'}: is incomplete or of another network" in said


def test_weights_alone_are_not_overwritten(scenes, out, fails):
    (out / "state.pth").unlink()
    assert "holds a training" in fails(*options(scenes, out=out))


def test_a_file_of_another_kind(scenes, out, fails):
    torch.save({"weights": torch.zeros(1)}, out / "state.pth")
    said = fails(*options(scenes, out=out, resume=True, iterations=2))
    assert "is of another kind or version" in said


def test_a_finished_training_trains_no_more(scenes, out, capsys):
    before = weights(out)
    assert main(options(scenes, out=out, resume=True, iterations=2)) == 0
    assert weights(out) == before
    assert "best mIoU" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train.csv", "val.csv"])
def test_a_table_of_another_program_is_kept(scenes, tmp_path, fails, name):
    (tmp_path / name).write_text("name,age\n")
    said = fails(*options(scenes, out=tmp_path))
    assert f"{tmp_path / name}: exists and is no table of emanet-triton train" in said
    assert (tmp_path / name).read_text() == "name,age\n"


@pytest.mark.parametrize("name", ["train.csv", "val.csv"])
def test_a_resumed_training_keeps_a_table_of_another_program(scenes, out, fails, name):
    (out / name).write_text("name,age\n")
    said = fails(*options(scenes, out=out, resume=True, iterations=3))
    assert f"{out / name}: exists and is no table of emanet-triton train" in said
    assert (out / name).read_text() == "name,age\n"


def test_a_checkpoint_of_an_earlier_training_is_kept(scenes, tmp_path, fails):
    (tmp_path / "iter_2.safetensors").write_text("weights")
    assert "holds a training" in fails(*options(scenes, out=tmp_path, keep_every=2))
    assert (tmp_path / "iter_2.safetensors").read_text() == "weights"


def test_tables_without_a_state_are_replaced(scenes, out):
    for name in ("state.pth", "last.safetensors", "best.safetensors"):
        (out / name).unlink()
    assert main(options(scenes, out=out, iterations=2)) == 0


def test_only_an_earlier_picture_of_samples_is_replaced(scenes, tmp_path, fails):
    picture = tmp_path / "samples.png"
    write_png(picture, np.zeros((8, 8, 3), np.uint8))
    before = picture.read_bytes()
    said = fails(*options(scenes, out=tmp_path, dry_run=True))
    assert f"{picture}: exists and is no picture of emanet-triton train --dry-run" in said
    assert picture.read_bytes() == before
    picture.unlink()
    for _ in range(2):
        assert main(options(scenes, out=tmp_path, dry_run=True)) == 0
    assert read_image(picture).shape[2] == 3


@pytest.mark.parametrize("dry_run", [None, True], ids=["training", "dry run"])
def test_a_folder_of_the_data_set(own_scenes, fails, dry_run):
    out = own_scenes / "gtFine" / "out"
    said = fails(*options(own_scenes, out=out, dry_run=dry_run))
    assert f"--out {out}: lies in the data set's {own_scenes / 'gtFine'}" in said
    assert not out.exists()
