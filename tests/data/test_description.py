"""Data sets that a TOML file describes: what the file may say, and what its labels mean."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from described_sets import FLAT, described, names_in, write
from png_files import encoded, palette_image

from emanet_triton import Dataset, open_dataset
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import IGNORE, Sample
from emanet_triton.data.description import dataset_from
from emanet_triton.data.png import read_image, read_label_png, write_png
from emanet_triton.data.voc import voc_color
from emanet_triton.errors import InputError


def test_the_example_that_comes_with_the_package():
    example = Path(__file__).parents[2] / "demo" / "five.toml"
    dataset, root = open_dataset(example)
    assert (dataset.name, root) == ("Five", example.parent / "scenes")
    assert [each.name for each in dataset.classes] == [
        *("flat", "construction", "nature", "sky", "things")
    ]
    assert dataset.folders == ("leftImg8bit", "gtFine")
    scored = {number for each in dataset.description["classes"] for number in each["ids"]}
    assert scored == {each.label_id for each in CITYSCAPES.classes}


def test_another_place_is_the_root_of_the_default(tmp_path):
    assert open_dataset(tmp_path) == (CITYSCAPES, tmp_path)
    assert open_dataset(str(tmp_path / "none"), described())[1] == tmp_path / "none"


def test_the_defaults(tmp_path):
    path = tmp_path / "beach.toml"
    path.write_text(
        'images = "photos/{name}.png"\nlabels = "./masks//{name}.png"\nclasses = ["sea", "sand"]'
    )
    dataset, root = open_dataset(path)
    assert root == tmp_path
    assert dataset.published_on is None
    assert dataset.description == {
        "name": "beach",
        "images": "photos/{name}.png",
        "labels": "masks/{name}.png",
        "ignored": [255],
        "classes": [
            {"name": "sea", "color": [0, 0, 0], "ids": [0]},
            {"name": "sand", "color": [128, 0, 0], "ids": [1]},
        ],
        "splits": {},
    }


def test_the_description_makes_the_same_data_set_again(tmp_path):
    write(tmp_path / "root", "val/a")
    dataset = described(name="Beach", splits={"train": "train.txt"}, root="elsewhere")
    again = dataset_from(json.loads(json.dumps(dataset.description)))
    assert again.description == dataset.description
    assert "root" not in again.description
    assert again.classes == dataset.classes
    assert names_in(again, tmp_path / "root") == ["a"]
    copied = pickle.loads(pickle.dumps(dataset))  # as a process that reads its images needs it
    assert names_in(copied, tmp_path / "root") == ["a"]


@pytest.mark.parametrize("root", ["sets/beach", "~/sets/beach", "{tmp_path}/sets/beach"])
def test_the_root_is_relative_to_the_file(tmp_path, monkeypatch, root):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = Path("beach.toml")
    content = f'root = "{root.format(tmp_path=tmp_path)}"\nclasses = ["a"]\n'
    path.write_text(content + 'images = "{name}.jpg"\nlabels = "{name}.png"\n')
    assert open_dataset(path)[1].absolute() == tmp_path / "sets" / "beach"


def test_colours_of_pascal_voc():
    assert [voc_color(i) for i in (0, 1, 2, 3, 8, 20, 255)] == [
        *((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (64, 0, 0), (0, 64, 128)),
        (224, 224, 192),
    ]


TABLES = [{"name": "sea", "ids": [7, 9]}, {"name": "sand", "color": [1, 2, 3], "ids": [300]}]


def test_ids_of_labels_and_of_predictions(tmp_path):
    dataset = described(classes=TABLES, ignored=[4, 65535])
    path = tmp_path / "label.png"
    ids = np.array([[7, 9, 300], [4, 65535, 7]], np.uint16)
    write_png(path, ids)
    label = dataset.read_labels(_sample(path))
    assert label.dtype == np.uint8
    assert label.tolist() == [[0, 0, 1], [IGNORE, IGNORE, 0]]
    stored = dataset.to_stored_ids(label)
    assert stored.tolist() == [[7, 7, 300], [4, 4, 7]]
    write_png(path, stored)
    np.testing.assert_array_equal(read_label_png(path), stored)


@pytest.mark.parametrize(("ignored", "stored"), [([3, 4], 3), ([], 255)])
def test_the_id_of_what_is_ignored(ignored, stored):
    dataset = described(ignored=ignored)
    ids = dataset.to_stored_ids(np.array([[0, 1, IGNORE]], np.uint8))
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 1, stored]]


def test_255_classes(tmp_path):
    dataset = described(classes=[f"class {i}" for i in range(255)])
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_png(tmp_path / "label.png", ids)
    np.testing.assert_array_equal(dataset.read_labels(_sample(tmp_path / "label.png")), ids)
    assert "holds the ids 256, which" in _refused_label(dataset, tmp_path, [[256]])


def test_ids_that_no_class_has(tmp_path):
    dataset = described(classes=TABLES, ignored=[0, 1, 2, 255])
    assert _refused_label(dataset, tmp_path, [[3, 7], [5, 3]]) == (
        "holds the ids 3, 5, which no class has and which are not ignored; expected 0 to 2, 7, "
        "9, 255, 300"
    )
    many = _refused_label(dataset, tmp_path, [list(range(10, 30))])
    assert many.startswith("holds the ids 10, 11, 12, 13, 14, 15, 16, 17, ..., which")


def _refused_label(dataset: Dataset, folder: Path, ids: list[list[int]]) -> str:
    path = folder / "label.png"
    write_png(path, np.array(ids, np.uint16))
    with pytest.raises(InputError) as raised:
        dataset.read_labels(_sample(path))
    return str(raised.value).removeprefix(f"{path}: ")


def _sample(label: Path) -> Sample:
    return Sample("x", label, label)


def test_pictures_of_any_kind_and_palette_labels(tmp_path):
    dataset = described(images="{name}.jpg", labels="{name}_mask.png", classes=["a", "b", "c"])
    pixels = np.full((4, 6, 3), 200, np.uint8)
    (tmp_path / "x.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    indices = np.array([[0, 1, 2, 0, 1, 2]] * 4, np.uint8)
    (tmp_path / "x_mask.png").write_bytes(encoded(palette_image(indices)))
    (sample,) = dataset.find_samples(tmp_path)
    assert dataset.check(sample) == []
    assert np.abs(dataset.read_image(sample.image).astype(int) - 200).max() < 3
    np.testing.assert_array_equal(dataset.read_labels(sample), indices)

    (tmp_path / "x.jpg").write_bytes(cv2.imencode(".jpg", pixels[:3])[1].tobytes())
    assert dataset.check(sample) == [f"{sample.label}: 6x4 pixels, its image has 6x3"]
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-30])
    assert dataset.check(sample)[0].startswith(f"{sample.image}: not a readable JPEG (")
    write_png(tmp_path / "x.jpg", pixels)  # the content says the kind
    assert dataset.check(sample) == []
    np.testing.assert_array_equal(dataset.read_image(sample.image), read_image(sample.image))


CLASS = {"name": "sea", "ids": [0]}
IDS = "a list of whole numbers, each 0 to 65535"
PLACE = "a pattern below the root such as 'images/{split}/{name}.png'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"imags": "x"},
            "unknown key 'imags' (did you mean 'images'?); expected some of: name, root, images, "
            "labels, ignored, classes, splits",
        ),
        ({"": 1}, "unknown key ''; expected some of: name, root"),
        ({"images": None}, "the key 'images' must be given"),
        ({"images": None, "classes": None}, "the keys 'images' and 'classes' must be given"),
        ({"root": 3}, "root: expected the path of a folder, got 3"),
        ({"root": "a\0"}, "root: expected the path of a folder, got 'a\\x00'"),
        ({"name": ""}, "name: expected a name, got ''"),
        ({"name": ["x"]}, "name: expected a name, got ['x']"),
        ({"name": "a\nb"}, "name: expected a name, got 'a\\nb'"),
        (
            {"images": "photos/*.png"},
            "images: expected a pattern with {name} such as 'images/{split}/{name}.png', got "
            "'photos/*.png'",
        ),
        ({"labels": 3}, "labels: expected a pattern with {name} such as"),
        ({"labels": "../{name}.png"}, f"labels: expected {PLACE}, got '../{{name}}.png'"),
        ({"labels": "a/../{name}.png"}, f"labels: expected {PLACE}, got"),
        ({"labels": "/a/{name}.png"}, f"labels: expected {PLACE}, got '/a/{{name}}.png'"),
        ({"labels": "a\0{name}.png"}, f"labels: expected {PLACE}, got 'a\\x00{{name}}.png'"),
        (
            {"labels": "./photos/{split}/{name}.png"},
            "images and labels have the same pattern, 'photos/{split}/{name}.png'",
        ),
        ({"classes": []}, "classes: expected a list of classes, got []"),
        ({"classes": {"name": "sea"}}, "classes: expected a list of classes, got {'name': 'sea'}"),
        ({"classes": [f"{i}" for i in range(256)]}, "classes: expected at most 255, got 256"),
        ({"classes": ["sea", "sand", "sea"]}, "classes: two have the name 'sea'"),
        ({"classes": [3]}, "class 1: expected a name, or a table with name, color and ids, got 3"),
        ({"classes": ["sea", ""]}, "class 2: name: expected a name, got ''"),
        ({"classes": [{"ids": [0]}]}, "class 1: the key 'name' must be given"),
        (
            {"classes": [{"name": "sea", "colour": [0, 0, 0]}]},
            "class 1: unknown key 'colour' (did you mean 'color'?); expected some of: name, color, "
            "ids",
        ),
        ({"classes": [CLASS | {"ids": []}]}, "class 'sea': ids: expected at least one id, got []"),
        ({"classes": [CLASS | {"ids": 3}]}, f"class 'sea': ids: expected {IDS}, got 3"),
        ({"classes": [CLASS | {"ids": [True]}]}, f"class 'sea': ids: expected {IDS}, got [True]"),
        ({"classes": [CLASS | {"ids": [65536]}]}, f"class 'sea': ids: expected {IDS}, got [65536]"),
        ({"ignored": [-1]}, f"ignored: expected {IDS}, got [-1]"),
        ({"ignored": [1.0]}, f"ignored: expected {IDS}, got [1.0]"),
        ({"ignored": 255}, f"ignored: expected {IDS}, got 255"),
        ({"ignored": 16**5000}, f"ignored: expected {IDS}, got a number of thousands of digits"),
        (
            {"classes": [CLASS | {"color": [0, 0]}]},
            "class 'sea': color: expected [red, green, blue], each 0 to 255, got [0, 0]",
        ),
        ({"classes": [CLASS | {"color": [0, 0, 256]}]}, "class 'sea': color: expected [red,"),
        ({"classes": [CLASS | {"color": "red"}]}, "class 'sea': color: expected [red,"),
        (
            {"classes": [CLASS, {"name": "sand", "ids": [1, 0]}]},
            "the id 0 is in class 'sea' and in class 'sand'; expected each id once",
        ),
        (
            {"ignored": [1, 255]},
            "the id 1 is in ignored and in class 'sand'; expected each id once",
        ),
        ({"splits": "train.txt"}, "splits: expected a table from a split to the file that"),
        ({"splits": {"train": 3}}, "splits: train: expected the path of a list below the root"),
        ({"splits": {"train": "../x.txt"}}, "splits: train: expected the path of a list below"),
        ({"splits": {"": "x.txt"}}, "splits: expected a name, got ''"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_wrong_description(changes, message):
    description = {key: value for key, value in (FLAT | changes).items() if value is not None}
    with pytest.raises(InputError) as raised:
        dataset_from(description)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"images = ", "not a readable TOML (Invalid value (at end of document)); expected an"),
        (b"a = 1\na = 2", "not a readable TOML (Cannot overwrite a value"),
        (b"a = '\xff'", "not a readable TOML (it is not UTF-8: byte 6 is wrong); expected an"),
        (b"a = " + b"[" * 10**5, "not a readable TOML ("),
        (b"#" * (2**20 + 1), "not a readable TOML (it has 1048577 bytes, at most 1048576 are read"),
        (b"a." * 10**4 + b"a = 1", "not a readable TOML (it has more than 2000 dots); expected"),
        (b"", "the keys 'images' and 'labels' and 'classes' must be given"),
        (b"date = 1979-05-27", "unknown key 'date'; expected some of"),
    ],
    ids=["syntax", "twice", "bytes", "deep", "large", "dots", "empty", "date"],
)
def test_a_wrong_file(tmp_path, content, message):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: {message}")


def refused(path: Path) -> str:
    with pytest.raises(InputError) as raised:
        open_dataset(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_that_are_none(tmp_path):
    folder, missing, other = (tmp_path / name for name in ("x.toml", "y.toml", "z.yaml"))
    folder.mkdir()
    other.touch()
    assert refused(folder).startswith(f"{folder}: not a readable TOML (Is a directory); expected")
    assert "y.toml: there is no such file; expected a TOML file" in refused(missing)
    assert refused(other) == (
        f"{other}: is a file; expected the root folder of Cityscapes, or a file *.toml that "
        "describes a data set"
    )
