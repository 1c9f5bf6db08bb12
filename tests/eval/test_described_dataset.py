"""Described data sets and trained checkpoints, evaluated from end to end."""

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_eval
import torch
from png_files import encoded, palette_image
from trained_files import TRAINED, write_trained

from emanet_triton import open_dataset, segment
from emanet_triton.data.dataset import IGNORE
from emanet_triton.data.description import dataset_from
from emanet_triton.data.png import read_label_png, write_png
from emanet_triton.data.scenes.generate import write_scenes
from emanet_triton.eval import metric
from emanet_triton.eval.__main__ import main

FIVE = Path(__file__).parents[2] / "demo" / "five.toml"
NAMES = ["flat", "construction", "nature", "sky", "things"]


@pytest.fixture
def scenes(tmp_path):
    """The file that describes three scenes, in a folder with them."""
    write_scenes(tmp_path / "scenes", "val", 3)
    return Path(shutil.copy(FIVE, tmp_path))


def expected(network: torch.nn.Module, file: Path) -> list[list[int]]:
    """The confusion matrix of the split val that a plain loop counts."""
    dataset, root = open_dataset(file)
    total = torch.zeros(len(dataset.classes), len(dataset.classes), dtype=torch.int64)
    for sample in dataset.find_samples(root):
        predicted = torch.from_numpy(segment(network, dataset.read_image(sample.image)))
        label = torch.from_numpy(dataset.read_labels(sample))
        total += metric.confusion_matrix(label, predicted, len(dataset.classes))
    return total.tolist()


def test_five_classes_with_a_checkpoint_of_mmsegmentation(tmp_path, scenes, capsys):
    ckpt = tiny_eval.write_checkpoint(tmp_path, "five.pth", num_classes=5)
    folders = "--save-predictions", str(tmp_path / "p"), "--save-overlays", str(tmp_path / "o")
    got = tiny_eval.run(tmp_path, scenes, ckpt, "--model", "tiny", "--no-fuse", *folders)
    assert got["confusion"] == expected(tiny_eval.tiny_network(5), scenes)
    assert list(got["IoU"]) == NAMES
    assert got["published"] is None
    assert got["data"] == str(tmp_path / "scenes")
    dataset, _ = open_dataset(scenes)
    assert (got["dataset"], got["description"]) == (dataset.name, dataset.description)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:7]] == NAMES
    names = [f"synthetic_synthetic_000000_{i:06d}.png" for i in range(3)]
    for folder in ("p", "o"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    assert set(np.unique(read_label_png(tmp_path / "p" / names[0]))) <= {7, 11, 21, 23, 17}


@pytest.fixture
def trained(tmp_path):
    """A file of a training on the five classes."""
    description = open_dataset(FIVE)[0].description
    content = replace(TRAINED, classes=tuple(NAMES), dataset=description)
    return write_trained(tmp_path / "last.safetensors", content, num_classes=5)


def test_a_trained_file_needs_no_model_and_no_description(tmp_path, scenes, trained):
    network = tiny_eval.tiny_network(5)
    network.protocol = TRAINED.protocol
    want = expected(network, scenes)
    for data in (scenes, tmp_path / "scenes"):
        got = tiny_eval.run(tmp_path, data, trained, "--no-fuse")
        assert got["confusion"] == want
        assert (got["model"], got["protocol"]["base_scale"]) == ("tiny", [48, 24])


def test_a_description_wins_over_the_trained_file(tmp_path, scenes, trained, fails, capsys):
    text = scenes.read_text().replace("flat", "level").replace("[7, 8]", "[8, 7]")
    scenes.write_text(text)
    assert list(tiny_eval.run(tmp_path, scenes, trained)["IoU"]) == ["level", *NAMES[1:]]
    capsys.readouterr()
    sky = '[[classes]]\nname = "sky"\ncolor = [70, 130, 180]\nids = [23]\n'
    assert sky in text
    scenes.write_text(text.replace(sky, "").replace("[0, 1,", "[23, 0, 1,"))
    message = fails("--ckpt", trained, "--data", scenes)
    assert "decode_head.conv_seg.weight: file [5, 8, 1, 1], model [4, 8, 1, 1]" in message
    assert "The file is for 5 classes, the model for 4; create_model takes num_classes=" in message


def test_a_checkpoint_of_another_number_of_classes(tmp_path, scenes, fails):
    ckpt = tiny_eval.write_checkpoint(tmp_path)
    message = fails("--ckpt", ckpt, "--data", scenes)
    assert "The file is for 19 classes, the model for 5;" in message


def test_the_data_are_missing(trained, fails, tmp_path):
    assert fails("--ckpt", trained) == "error: --data is missing; expected the root of Five\n"
    assert fails("--ckpt", trained, "--data", tmp_path / "none") == (
        f"error: {tmp_path / 'none'}: not usable as Five split 'val'\n"
        "  there is no such folder; expected one with leftImg8bit and gtFine\n"
    )


def test_the_demonstrations_model_with_other_classes_is_no_demonstration(tmp_path, trained, fails):
    content = replace(TRAINED, model="emanet_demo")
    path = write_trained(tmp_path / "demo.safetensors", content)
    assert fails("--ckpt", path) == "error: --data is missing; expected the root of Beach\n"


def test_wrong_descriptions_are_refused_before_a_checkpoint_is_read(
    tmp_path, scenes, fails, monkeypatch
):
    monkeypatch.setattr("emanet_triton.models.chosen.read_checkpoint", lambda _: 1 / 0)
    ckpt = tiny_eval.write_checkpoint(tmp_path, "unknown.pth")
    scenes.write_text(scenes.read_text().replace("images =", "image ="))
    message = fails("--ckpt", ckpt, "--data", scenes)
    assert message.startswith(f"error: {scenes}: unknown key 'image' (did you mean 'images'?)")
    other = tmp_path / "five.yaml"
    other.touch()
    for model in ([], ["--model", "tiny"]):
        message = fails("--ckpt", ckpt, "--data", tmp_path / "none.toml", *model)
        assert "none.toml: there is no such file; expected a TOML file" in message
    message = fails("--ckpt", ckpt, "--model", "tiny", "--data", other)
    assert message.startswith(f"error: {other}: is a file; expected the root folder of Cityscapes")


def test_a_description_together_with_a_public_data_set(scenes, trained, fails):
    assert fails("--ckpt", trained, "--data", scenes, "--dataset", "voc2012") == (
        f"error: --dataset voc2012: --data {scenes} describes its own data set\n"
    )
    assert fails("--all", "bdd100k", "--data", scenes) == (
        f"error: --all bdd100k: --data {scenes} does not say which models are meant; expected "
        "--dataset with one of bdd100k, bdd100k-drivable\n"
    )


def test_problems_of_the_files(tmp_path, scenes, trained, fails):
    label = tiny_eval.image_of(tmp_path / "scenes", "gtFine")
    write_png(label, np.full((256, 512), 77, np.uint8))
    message = fails("--ckpt", trained, "--data", scenes)
    assert "1 problem in the data set:\n" in message
    assert f"  {label}: holds the ids 77, which no class has and which are not ignored" in message
    assert "ignored; expected 0 to 33, 255\n" in message
    assert fails("--ckpt", trained, "--data", scenes, "--split", "train").endswith(
        "  it has no split 'train', it has: val\n"
    )


def test_outputs_replace_no_description_and_no_list(tmp_path, trained, fails):
    file, root = beach(tmp_path)
    for json_file, words in (
        (file, f"--json: {file} would overwrite {file}; expected another place"),
        (root / "val.txt", f"lies in the data set's {root / 'val.txt'}; expected another place"),
        (root / "photos" / "x.json", f"lies in the data set's {root / 'photos'}; expected"),
    ):
        before = file.read_text()
        assert words in fails("--ckpt", trained, "--data", file, "--json", json_file)
        assert file.read_text() == before


def beach(folder: Path) -> tuple[Path, Path]:
    """JPEG images with palette labels and a list, and the file that describes them."""
    root = folder / "beach"
    (root / "photos" / "1 day").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("1 day/a", "b", "unlisted"):
        image = rng.integers(0, 256, (32, 64, 3), np.uint8)
        (root / "photos" / f"{name}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
        ids = np.kron(rng.integers(0, 4, (4, 8), np.uint8), np.ones((8, 8), np.uint8))
        (root / "photos" / f"{name}_ids.png").write_bytes(encoded(palette_image(ids)))
    (root / "val.txt").write_text("b\n1 day/a\n")
    file = folder / "beach.toml"
    file.write_text(
        'root = "beach"\nimages = "photos/{name}.jpg"\nlabels = "photos/{name}_ids.png"\n'
        'ignored = [3]\nclasses = ["sea", "sand", "sky"]\n[splits]\nval = "val.txt"\n'
    )
    return file, root


def test_pictures_of_another_kind_with_a_list(tmp_path):
    file, root = beach(tmp_path)
    ckpt = tiny_eval.write_checkpoint(tmp_path, "three.pth", num_classes=3)
    folder = tmp_path / "predictions"
    options = "--model", "tiny", "--no-fuse", "--save-predictions", str(folder)
    got = tiny_eval.run(tmp_path, file, ckpt, *options)
    assert got["images"] == 2
    assert got["confusion"] == expected(tiny_eval.tiny_network(3), file)
    assert sorted(path.name for path in folder.iterdir()) == ["1 day_a.png", "b.png"]
    dataset = open_dataset(file)[0]
    assert not [s for s in dataset.find_samples(root) if (dataset.read_labels(s) == IGNORE).all()]


def test_ids_of_16_bits(tmp_path):
    root = beach(tmp_path)[1]
    for path in root.rglob("*_ids.png"):
        write_png(path, 1000 * read_label_png(path).astype(np.uint16))
    classes = [{"name": name, "ids": [1000 * i]} for i, name in enumerate(TRAINED.classes)]
    content = {"images": "photos/{name}.jpg", "labels": "photos/{name}_ids.png"}
    description = dataset_from(content | {"classes": classes, "ignored": [3000]}).description
    trained = write_trained(tmp_path / "x.safetensors", replace(TRAINED, dataset=description))
    tiny_eval.run(tmp_path, root, trained, "--save-predictions", str(tmp_path / "p"))
    saved = read_label_png(tmp_path / "p" / "b.png")
    assert saved.dtype == np.uint16
    assert set(np.unique(saved)) <= {0, 1000, 2000}


def test_a_changed_description_is_another_evaluation(tmp_path, scenes, trained, capsys):
    command = ["--ckpt", str(trained), "--data", str(scenes)]
    tiny_eval.stop_before_the_tables(command)
    assert main([*command, "--resume"]) == 0
    assert "resuming: 3 of 3 images were finished before" in capsys.readouterr().err
    tiny_eval.stop_before_the_tables(command)
    scenes.write_text(scenes.read_text().replace("[7, 8]", "[7]").replace("[0, 1,", "[8, 0, 1,"))
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "resuming: 0 of 3 images were finished before" in capsys.readouterr().err
