"""A data set that is added from outside the package: its value, and a zoo entry that names it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_eval

from emanet_triton import segment
from emanet_triton.data.dataset import IGNORE, Class, Dataset, Files, Sample
from emanet_triton.data.png import read_image, read_label_png, write_png
from emanet_triton.errors import InputError
from emanet_triton.eval.__main__ import main
from emanet_triton.eval.draw import wrong_color
from emanet_triton.models.zoo import ZOO

# Files lie at <split>/photos/<name>.png and <split>/masks/<name>.png. Masks hold 10, 20 and 30 for
# the classes, and 0 where nothing is scored.


def find_files(root: Path, split: str) -> tuple[Files, Files, list[str]]:
    photos, masks = (
        {(file.stem, ""): file for file in (root / split / kind).glob("*.png")}
        for kind in ("photos", "masks")
    )
    return photos, masks, [] if photos else [f"{root / split / 'photos'} holds no photo"]


def read_labels(sample: Sample) -> np.ndarray:
    ids = read_label_png(sample.label)
    if not np.isin(ids, (0, 10, 20, 30)).all():
        raise InputError(f"{sample.label}: expected the ids 0, 10, 20 and 30")
    return np.where(ids == 0, IGNORE, ids // 10 - 1).astype(np.uint8)


TOY = Dataset(
    name="Toys",
    classes=(Class("sea", (0, 255, 255)), Class("sand", (255, 220, 130)), Class("sky", (0, 0, 99))),
    folders=("day", "night"),
    find_files=find_files,
    read_labels=read_labels,
    prediction_name=lambda sample: f"{sample.name}_mask.png",
    to_stored_ids=lambda train_ids: 10 + 10 * train_ids,
    published_on=("day", 4),
)
NAME = "emanet_toy"


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    path = tiny_eval.write_checkpoint(tmp_path, "toy.pth", num_classes=3)
    entry = replace(ZOO["tiny"], file=path.name, dataset=TOY)
    monkeypatch.setitem(ZOO, NAME, entry)
    return path


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        ids = rng.choice(np.array([0, 10, 20, 30], np.uint8), (4, 8))
        for kind, pixels in (
            ("photos", rng.integers(0, 256, (32, 64, 3), np.uint8)),
            ("masks", np.kron(ids, np.ones((8, 8), np.uint8))),
        ):
            file = tmp_path / "toys" / "day" / kind / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_png(file, pixels)
    return tmp_path / "toys"


def test_it_is_evaluated_from_end_to_end(tmp_path, root, ckpt, capsys):
    outputs = [tmp_path / name for name in ("out.json", "predictions", "overlays")]
    options = zip(("--json", "--save-predictions", "--save-overlays"), outputs, strict=True)
    command = ["--ckpt", str(ckpt), "--data", str(root), "--split", "day"]
    command += [str(word) for option in options for word in option]
    assert main([*command, "--no-fuse"]) == 0

    model = tiny_eval.tiny_network(num_classes=3)
    want = np.zeros((3, 3), int)
    for i in range(4):
        predicted = segment(model, read_image(root / f"day/photos/{i}.png"))
        label = read_labels(Sample("", root, root / f"day/masks/{i}.png"))
        np.add.at(want, (label[label != IGNORE], predicted[label != IGNORE]), 1)
        saved = read_label_png(tmp_path / f"predictions/{i}_mask.png")
        np.testing.assert_array_equal(saved, 10 + 10 * predicted)
        overlay = read_image(tmp_path / f"overlays/{i}_mask.png")
        for color in (*(c.color for c in TOY.classes), wrong_color(TOY.classes)):
            assert (overlay == color).all(-1).sum() >= 20 * 20  # its swatch in the legend

    got = json.loads(outputs[0].read_text())
    assert got["confusion"] == want.tolist()
    assert got["model"] == NAME
    assert list(got["IoU"]) == ["sea", "sand", "sky"]
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:5]] == ["sea", "sand", "sky"]


def test_its_published_figure(tmp_path, root, ckpt, monkeypatch):
    command = ["--ckpt", str(ckpt), "--data", str(root), "--split", "day"]
    out = tmp_path / "out.json"
    assert main([*command, "--json", str(out)]) == 0
    sha256 = json.loads(out.read_text())["sha256"]
    monkeypatch.setitem(ZOO, NAME, replace(ZOO[NAME], sha256=sha256[:8]))
    assert main([*command, "--json", str(out)]) == 0
    assert json.loads(out.read_text())["published"]["mIoU"] == 50.0
    assert main([*command, "--json", str(out), "--limit", "3"]) == 0
    assert json.loads(out.read_text())["published"] is None


def said(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    return err[err.index("error: ") :]


def test_messages_name_it(root, ckpt, capsys):
    assert said(capsys, "--ckpt", ckpt) == ("error: --data is missing; expected the root of Toys\n")
    assert said(capsys, "--ckpt", ckpt, "--data", root / "typo", "--split", "day") == (
        f"error: {root / 'typo'}: not usable as Toys split 'day'\n"
        "  there is no such folder; expected one with day and night\n"
    )
    assert said(capsys, "--ckpt", ckpt, "--data", root, "--split", "night") == (
        f"error: {root}: not usable as Toys split 'night'\n"
        f"  {root / 'night' / 'photos'} holds no photo\n"
    )
    place = root / "night" / "out.json"
    assert said(capsys, "--ckpt", ckpt, "--data", root, "--split", "day", "--json", place) == (
        f"error: --json {place}: lies in the data set's {root / 'night'}; expected another place\n"
    )
    with pytest.raises(SystemExit):
        main(["--help"])
    assert ", Toys)" in " ".join(capsys.readouterr().out.split())


def test_a_checkpoint_of_another_number_of_classes(tmp_path, root, ckpt, capsys):
    ckpt.write_bytes(tiny_eval.write_checkpoint(tmp_path).read_bytes())
    assert "decode_head.conv_seg.weight: file [19, 8, 1, 1], model [3, 8, 1, 1]" in said(
        capsys, "--ckpt", ckpt, "--data", root, "--split", "day"
    )


def test_a_resumed_run_counts_its_classes(root, ckpt, capsys):
    command = ["--ckpt", str(ckpt), "--data", str(root), "--split", "day"]
    tiny_eval.stop_before_the_tables(command)
    assert main([*command, "--resume"]) == 0
    assert "resuming: 4 of 4 images were finished before" in capsys.readouterr().err
