import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import getPrediction
from cityscapesscripts.helpers.labels import labels as official_labels
from PIL import Image

from emanet_triton.data.cityscapes import (
    CITYSCAPES,
    CLASSES,
    CityscapesClass,
    Sample,
    check_sample,
    prediction_name,
    read_labels,
    to_label_ids,
    to_train_ids,
)
from emanet_triton.data.dataset import IGNORE, problems_error
from emanet_triton.data.png import read_label_png, write_png
from emanet_triton.errors import InputError

find_samples = CITYSCAPES.find_samples
RNG = np.random.RandomState(0)
NAMES = ("aachen_000000_000019", "aachen_000001_000019", "bonn_000000_000019")


def image_path(root: Path, name: str, split: str = "val") -> Path:
    return root / "leftImg8bit" / split / name.split("_")[0] / f"{name}_leftImg8bit.png"


def label_path(root: Path, name: str, split: str = "val", kind: str = "labelIds") -> Path:
    return root / "gtFine" / split / name.split("_")[0] / f"{name}_gtFine_{kind}.png"


def put(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, array)
    return path


def put_image(root: Path, name: str) -> Path:
    return put(image_path(root, name), RNG.randint(0, 256, (8, 12, 3)).astype(np.uint8))


def put_label(root: Path, name: str, kind: str = "labelIds") -> Path:
    count = 34 if kind == "labelIds" else 19
    return put(label_path(root, name, kind=kind), RNG.randint(0, count, (8, 12)).astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of three samples in the split val."""
    for name in reversed(NAMES):
        put_image(tmp_path, name)
        put_label(tmp_path, name)
    return tmp_path


def refused(root: Path, *problems: str, split: str = "val", limit: int | None = None) -> None:
    with pytest.raises(InputError) as caught:
        find_samples(root, split, limit)
    heading = f"{root}: not usable as Cityscapes split '{split}'"
    assert str(caught.value).splitlines() == [heading, *(f"  {problem}" for problem in problems)]


def test_classes_are_the_official_ones():
    scored = sorted(
        (label for label in official_labels if 0 <= label.trainId < IGNORE),
        key=lambda label: label.trainId,
    )
    assert tuple(CityscapesClass(label.name, label.color, label.id) for label in scored) == CLASSES


def test_samples_are_sorted_by_name(root):
    assert find_samples(root) == [
        Sample(name, image_path(root, name), label_path(root, name)) for name in NAMES
    ]
    assert [sample.name for sample in find_samples(root, limit=2)] == list(NAMES[:2])


def test_either_kind_of_label_will_do_and_label_ids_come_first(root):
    for name in NAMES[:2]:
        put_label(root, name, "labelTrainIds")
    label_path(root, NAMES[1]).unlink()
    kinds = [sample.label.stem.rsplit("_", 1)[-1] for sample in find_samples(root)]
    assert kinds == ["labelIds", "labelTrainIds", "labelIds"]


def test_hidden_files_and_folders_are_left_out(root):
    """macOS adds a ._NAME to every file when it copies a data set to another file system."""
    samples = find_samples(root)
    for path in sorted(root.rglob("*")):
        hidden = path.with_name(f"._{path.name}")
        if path.suffix == ".png":
            hidden.write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
        else:
            hidden.mkdir()
    for sample in samples:
        for path in (sample.image, sample.label):
            put(path.parents[1] / f"._{path.parent.name}" / path.name, np.zeros((8, 12), np.uint8))
    assert find_samples(root) == samples
    refused(
        root,
        f"{root / 'leftImg8bit'} has no 'test', it has: val",
        f"{root / 'gtFine'} has no 'test', it has: val",
        split="test",
    )


def test_folder_of_a_city_that_may_not_be_read(root, monkeypatch):
    """The test imitates the system's answer, because root may read every folder."""
    bonn, scandir = str(root / "gtFine" / "val" / "bonn"), os.scandir

    def list_folder(path):
        if str(path) == bonn:
            raise PermissionError(13, "Permission denied", bonn)
        return listdir(path)

    def scan_folder(path):
        if str(path) == bonn:
            raise PermissionError(13, "Permission denied", bonn)
        return scandir(path)

    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", list_folder)
    monkeypatch.setattr(os, "scandir", scan_folder)
    refused(root, f"it cannot be read ([Errno 13] Permission denied: '{bonn}')")


@pytest.mark.parametrize(
    "name", ["aachen_\x1b[2J_000019", "aachen_\n_000019", "aachen_\udcff_000019"]
)
def test_names_that_no_terminal_shows(tmp_path, name):
    put_image(tmp_path, name)
    label = put_label(tmp_path, name)
    (sample,) = find_samples(tmp_path)
    assert sample.name == name
    assert check_sample(sample) == []
    label.write_bytes(b"")
    assert check_sample(sample) == [
        f"{label}: not a readable PNG (empty file); expected an intact PNG file"
    ]


def test_missing_folders(root, tmp_path):
    none = tmp_path / "none"
    refused(none, "there is no such folder; expected one with leftImg8bit and gtFine")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, f"{empty / 'leftImg8bit'} is missing", f"{empty / 'gtFine'} is missing")


def test_unknown_split_names_those_there_are(root):
    (root / "leftImg8bit" / "train").mkdir()
    refused(
        root,
        f"{root / 'leftImg8bit'} has no 'vall', it has: train, val",
        f"{root / 'gtFine'} has no 'vall', it has: val",
        split="vall",
    )


def test_folder_that_the_system_refuses(root):
    split = "x" * 300
    with pytest.raises(InputError, match=r"it cannot be read \(.*File name too long"):
        find_samples(root, split)
    with pytest.raises(InputError, match=r"it cannot be read \(.*File name too long"):
        find_samples(root / split)


def test_empty_split(root):
    for tree in ("leftImg8bit", "gtFine"):
        (root / tree / "test").mkdir()
    refused(
        root,
        f"{root / 'leftImg8bit' / 'test'} holds no file <city>/<name>_leftImg8bit.png",
        f"{root / 'gtFine' / 'test'} holds no file "
        "<city>/<name>_gtFine_labelIds.png or _gtFine_labelTrainIds.png",
        split="test",
    )


def test_image_without_label_and_label_without_image_are_listed_together(root):
    unlabelled = put_image(root, "bonn_000001_000019")
    unseen = put_label(root, "bonn_000002_000019")
    refused(root, f"{unlabelled} has no label", f"{unseen} has no image")
    assert len(find_samples(root, limit=3)) == 3
    refused(root, f"{unlabelled} has no label", limit=4)


def test_label_of_another_city_folder_does_not_count(root):
    label = label_path(root, NAMES[2])
    moved = root / "gtFine" / "val" / "aachen" / label.name
    label.rename(moved)
    refused(
        root,
        f"{image_path(root, NAMES[2])} has no label",
        f"{moved} has no image",
        f"the name '{NAMES[2]}' is used in two folders, aachen and bonn",
    )


def test_name_in_two_cities(root):
    name = NAMES[0]
    for path in (image_path(root, name), label_path(root, name)):
        (path.parent.parent / "bonn" / path.name).write_bytes(path.read_bytes())
    refused(root, f"the name '{name}' is used in two folders, aachen and bonn")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(root, limit):
    with pytest.raises(InputError, match=rf"^limit {limit}: expected at least 1 image$"):
        find_samples(root, limit=limit)


def test_long_lists_of_problems_are_cut():
    lines = str(problems_error("heading", [str(i) for i in range(19)])).splitlines()
    assert lines == ["heading", *(f"  {i}" for i in range(19))]
    lines = str(problems_error("heading", [str(i) for i in range(25)])).splitlines()
    assert lines == ["heading", *(f"  {i}" for i in range(18)), "  ... and 7 more"]


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_sound_sample(root, kind):
    sample = find_samples(root)[0]
    sample = Sample(sample.name, sample.image, put_label(root, sample.name, kind))
    assert check_sample(sample) == []
    np.testing.assert_array_equal(
        read_labels(sample), to_train_ids(read_label_png(sample.label), kind)
    )


def test_wrong_size(root):
    sample = find_samples(root)[0]
    put(sample.label, np.zeros((6, 12), np.uint8))
    assert check_sample(sample) == [f"{sample.label}: 12x6 pixels, its image has 12x8"]


def test_damage_to_both_files_is_listed(root):
    sample = find_samples(root)[0]
    for path in (sample.image, sample.label):
        path.write_bytes(path.read_bytes()[:-5])
    assert check_sample(sample) == [
        f"{path}: not a readable PNG (it is truncated); expected an intact PNG file"
        for path in (sample.image, sample.label)
    ]


def test_coloured_label_is_refused(root):
    sample = find_samples(root)[0]
    put(sample.label, np.zeros((8, 12, 3), np.uint8))
    (problem,) = check_sample(sample)
    assert problem.startswith(f"{sample.label}: not a label PNG (8-bit colour or alpha)")


@pytest.mark.parametrize(
    ("kind", "ids", "message"),
    [
        ("labelIds", [34], "illegal labelIds 34; expected 0 to 33, or 255 for -1"),
        (
            "labelIds",
            [254, 40, 7],
            "illegal labelIds 40, 254; expected 0 to 33, or 255 for -1",
        ),
        (
            "labelIds",
            range(40, 50),
            "illegal labelIds 40, 41, 42, 43, 44, 45, 46, 47, ...; expected 0 to 33, or 255 for -1",
        ),
        (
            "labelTrainIds",
            [7, 19, 33],
            "illegal labelTrainIds 19, 33; expected 0 to 18, or 255 for ignored "
            "(these look like labelIds)",
        ),
        (
            "labelTrainIds",
            [7, 19, 34],
            "illegal labelTrainIds 19, 34; expected 0 to 18, or 255 for ignored",
        ),
    ],
    ids=["one past the last", "two", "many", "train ids that are label ids", "neither"],
)
def test_illegal_ids(root, kind, ids, message):
    sample = find_samples(root)[0]
    label = put(
        label_path(root, sample.name, kind=kind), np.tile(np.uint8([*ids]), (8, 12))[:, :12]
    )
    sample = Sample(sample.name, sample.image, label)
    expected = f"{label}: {message}"
    assert check_sample(sample) == [expected]
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        read_labels(sample)


def test_16_bit_instance_ids_are_illegal(root):
    sample = find_samples(root)[0]
    Image.fromarray(np.full((8, 12), 26_001, np.uint16)).save(sample.label)
    assert check_sample(sample) == [
        f"{sample.label}: illegal labelIds 26001; expected 0 to 33, or 255 for -1"
    ]


def test_label_ids_become_the_official_train_ids():
    known = [label for label in official_labels if label.id >= 0]
    ids = np.array([[label.id for label in known]], np.uint8)
    np.testing.assert_array_equal(
        to_train_ids(ids, "labelIds"), [[label.trainId for label in known]]
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_minus_one_is_ignored_however_it_is_stored(dtype):
    stored = np.array([[-1]]).astype(dtype)
    assert to_train_ids(stored, "labelIds") == IGNORE


def test_label_train_ids_stay():
    ids = np.array([[*range(19), IGNORE]], np.uint8)
    train_ids = to_train_ids(ids, "labelTrainIds")
    assert train_ids.dtype == np.uint8
    np.testing.assert_array_equal(train_ids, ids)


def test_to_label_ids_is_the_inverse():
    train_ids = np.array([[*range(19), IGNORE]], np.uint8)
    label_ids = to_label_ids(train_ids)
    assert label_ids.dtype == np.uint8
    assert label_ids[0].tolist() == [c.label_id for c in CLASSES] + [0]
    np.testing.assert_array_equal(to_train_ids(label_ids, "labelIds"), train_ids)
    with pytest.raises(IndexError):
        to_label_ids(np.array([[19]], np.uint8))


def test_cityscapesscripts_finds_the_predictions(root):
    folder = root / "predictions"
    folder.mkdir()
    samples = find_samples(root)
    for sample in samples:
        write_png(folder / prediction_name(sample), np.zeros((8, 12), np.uint8))
    args = SimpleNamespace(predictionPath=str(folder), predictionWalk=None)
    for sample in samples:
        found = getPrediction(args, str(label_path(root, sample.name)))
        assert found == str(folder / f"{sample.name}_leftImg8bit.png")
