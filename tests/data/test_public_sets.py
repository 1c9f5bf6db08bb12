"""Pascal VOC 2012, ADE20K and BDD100K: their classes, folders and ids."""

import re
from collections import Counter

import cv2
import numpy as np
import pytest
from public_sets import LISTS, SETS, jpeg, label, legal_ids, places, write

from emanet_triton import palette
from emanet_triton.data.ade20k import ADE20K
from emanet_triton.data.bdd100k import BDD100K, BDD100K_DRIVABLE
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import IGNORE, Sample
from emanet_triton.data.overlay import Text, draw_legend, legend_entries
from emanet_triton.data.png import read_image, read_label_png, write_png
from emanet_triton.data.voc import VOC2012
from emanet_triton.errors import InputError

every_set = pytest.mark.parametrize("dataset", SETS, ids=lambda dataset: dataset.name)


def refused(dataset, root, *problems, split="val"):
    with pytest.raises(InputError) as caught:
        dataset.find_samples(root, split)
    heading = f"{root}: not usable as {dataset.name} split '{split}'"
    assert str(caught.value).splitlines() == [heading, *(f"  {problem}" for problem in problems)]


@pytest.mark.parametrize(
    ("dataset", "count", "first", "last"),
    [
        (VOC2012, 21, ("background", (0, 0, 0)), ("tvmonitor", (0, 64, 128))),
        (ADE20K, 150, ("wall", (120, 120, 120)), ("flag", (92, 0, 255))),
        (BDD100K, 19, ("road", (128, 64, 128)), ("bicycle", (119, 11, 32))),
        (BDD100K_DRIVABLE, 3, ("direct", (219, 94, 86)), ("background", (0, 0, 0))),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_classes(dataset, count, first, last):
    classes = [(each.name, each.color) for each in dataset.classes]
    assert len(classes) == len({name for name, _ in classes}) == count
    assert (classes[0], classes[-1]) == (first, last)
    assert palette(dataset).shape == (count, 3)


def test_colours_that_classes_share():
    """The benchmark gives road and skyscraper of ADE20K one colour; all others differ."""
    shared = {
        dataset.name: [
            [each.name for each in dataset.classes if each.color == color]
            for color, count in Counter(each.color for each in dataset.classes).items()
            if count > 1
        ]
        for dataset in SETS
    }
    assert {name: found for name, found in shared.items() if found} == {
        "ADE20K": [["road", "skyscraper"]]
    }


def test_some_classes_by_their_number():
    def names(dataset, *numbers):
        return [dataset.classes[number].name for number in numbers]

    assert names(ADE20K, 7, 56, 89, 127) == ["bed", "pool table", "television receiver", "bicycle"]
    assert ADE20K.classes[12].color == (150, 5, 61)
    assert names(VOC2012, 5, 11, 15, 16) == ["bottle", "diningtable", "person", "pottedplant"]
    assert [(each.name, each.color) for each in BDD100K.classes] == [
        (each.name, each.color) for each in CITYSCAPES.classes
    ]


@every_set
def test_samples_of_both_splits(dataset, tmp_path):
    for split, names in (("train", ("b", "a", "c")), ("val", ("e", "d"))):
        write(dataset, tmp_path, *names, split=split)
    for split, names in (("train", "abc"), ("val", "de")):
        samples = [Sample(name, *places(dataset, tmp_path, name, split)) for name in names]
        assert dataset.find_samples(tmp_path, split) == samples
        assert [problem for each in samples for problem in dataset.check(each)] == []
    image, train_ids = dataset.read(samples[0])
    assert (image.shape, image.dtype) == ((32, 48, 3), np.uint8)
    assert train_ids.shape == (32, 48)


@every_set
def test_ids_become_train_ids_and_those_of_predictions(dataset, tmp_path):
    ids = legal_ids(dataset)[None]
    write(dataset, tmp_path, "x")
    (sample,) = dataset.find_samples(tmp_path)
    label(dataset, sample.label, ids)
    train_ids = dataset.read_labels(sample)
    assert train_ids.tolist() == [[*range(len(dataset.classes)), IGNORE]]
    assert dataset.prediction_name(sample) == "x.png"
    write_png(tmp_path / "x.png", dataset.to_stored_ids(train_ids))
    np.testing.assert_array_equal(read_label_png(tmp_path / "x.png"), ids)


@pytest.mark.parametrize(
    ("dataset", "ids", "message"),
    [
        (VOC2012, [20, 21, 255], "21, which no class has and which are not ignored; "
         "expected 0 to 20, 255"),
        (ADE20K, [0, 150, 151, 255], "151, 255, which no class has and which are not ignored; "
         "expected 0 to 150"),
        (BDD100K, [18, 33], "33, which no class has and which are not ignored; "
         "expected 0 to 18, 255"),
        (BDD100K_DRIVABLE, [3], "3, which no class has and which are not ignored; "
         "expected 0 to 2, 255"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_illegal_ids(dataset, ids, message, tmp_path):
    write(dataset, tmp_path, "x", size=(8, 8))
    (sample,) = dataset.find_samples(tmp_path)
    label(dataset, sample.label, np.resize(np.uint8(ids), (8, 8)))
    assert dataset.check(sample) == [f"{sample.label}: holds the ids {message}"]


@every_set
def test_image_without_label(dataset, tmp_path):
    write(dataset, tmp_path, "a", "b")
    image, label_path = places(dataset, tmp_path, "b")
    label_path.unlink()
    refused(dataset, tmp_path, f"{image} has no label")


@pytest.mark.parametrize("dataset", SETS[1:], ids=lambda dataset: dataset.name)
def test_label_without_image_and_wrong_folders(dataset, tmp_path):
    write(dataset, tmp_path, "a", "b")
    image, label_path = places(dataset, tmp_path, "a")
    image.unlink()
    refused(dataset, tmp_path, f"{label_path} has no image")
    with pytest.raises(InputError, match=r"it has no split 'test', it has: val"):
        dataset.find_samples(tmp_path, "test")
    images, labels = (image.relative_to(tmp_path), label_path.relative_to(tmp_path))
    wrong = tmp_path / images.parts[0]
    split = label_path.parent.name
    with pytest.raises(InputError) as caught:
        dataset.find_samples(wrong)
    pattern = "{} and {}".format(
        *(
            str(path).replace(f"/{split}/", "/{split}/").replace("/a.", "/{name}.")
            for path in (images, labels)
        )
    )
    assert f"it has no split '{split}': no file matches {pattern}" in str(caught.value)
    none = tmp_path / "none"
    with pytest.raises(InputError, match=r"there is no such folder; expected one with images/?"):
        dataset.find_samples(none)


def test_the_folders_of_ade20k_are_names_of_splits_too(tmp_path):
    write(ADE20K, tmp_path, "x", split="train")
    write(ADE20K, tmp_path, "y", split="val")
    for split, folder in (("train", "training"), ("val", "validation")):
        assert ADE20K.find_samples(tmp_path, split) == ADE20K.find_samples(tmp_path, folder)


def test_images_of_voc_that_no_list_names_are_left_out(tmp_path):
    write(VOC2012, tmp_path, "a", "b")
    (tmp_path / LISTS / "val.txt").write_text("b\n")
    (tmp_path / LISTS / "._val.txt").write_bytes(b"\0\5\x16\7")
    assert [sample.name for sample in VOC2012.find_samples(tmp_path)] == ["b"]


def test_lists_of_voc(tmp_path):
    write(VOC2012, tmp_path / "VOCdevkit" / "VOC2012", "a")
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for above in (tmp_path, tmp_path / "VOCdevkit"):
        lists = above / LISTS
        refused(VOC2012, above, f"{lists} is missing; expected {root} as the root")
    refused(VOC2012, root / "JPEGImages", f"{root / 'JPEGImages' / LISTS} is missing")
    for split in ("test", "../val", ""):
        refused(
            VOC2012, root, f"{root / LISTS} has no list '{split}.txt', it has: val", split=split
        )
    (root / LISTS / "val.txt").write_text("a\nb\n")
    missing = root / "JPEGImages" / "b.jpg"
    refused(VOC2012, root, f"{missing} is missing; {root / LISTS / 'val.txt'} names it in line 2")
    (root / LISTS / "val.txt").write_text("")
    refused(VOC2012, root, f"{root / LISTS / 'val.txt'} is empty; expected one name a line")


def test_a_grey_image_and_one_that_exif_turns(tmp_path):
    write(ADE20K, tmp_path, "x")
    (sample,) = ADE20K.find_samples(tmp_path)
    jpeg(sample.image, np.full((32, 48), 99, np.uint8))
    assert ADE20K.check(sample) == []
    image, _ = ADE20K.read(sample)
    assert (image == image[:1, :1]).all()
    assert image.shape == (32, 48, 3)
    exif = (
        b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    )
    data = sample.image.read_bytes()
    sample.image.write_bytes(data[:2] + exif + data[2:])
    assert ADE20K.check(sample) == [f"{sample.label}: 48x32 pixels, its image has 32x48"]


def test_a_jpeg_that_libjpeg_complains_about_may_be_written_anew_as_png(tmp_path):
    """The way out that docs/datasets.md names: OpenCV's pixels in a PNG under the same name."""
    write(VOC2012, tmp_path, "x")
    (sample,) = VOC2012.find_samples(tmp_path)
    data = sample.image.read_bytes()
    sample.image.write_bytes(data[:-2] + b"\0" * 7 + data[-2:])
    (problem,) = VOC2012.check(sample)
    reason = r"Corrupt JPEG data: [67] extraneous bytes before marker 0xd9"
    assert re.fullmatch(
        rf"{sample.image}: not a readable JPEG \({reason}\); expected an intact JPEG file", problem
    )
    with pytest.raises(InputError, match=reason):
        VOC2012.read(sample)

    pixels = cv2.imdecode(np.fromfile(sample.image, np.uint8), cv2.IMREAD_COLOR)
    sample.image.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    assert VOC2012.check(sample) == []
    np.testing.assert_array_equal(VOC2012.read_image(sample.image), read_image(sample.image))
    np.testing.assert_array_equal(VOC2012.read_image(sample.image), pixels[:, :, ::-1])


def test_a_legend_of_150_classes():
    entries = legend_entries(ADE20K)
    legend = draw_legend(entries, 400, Text.for_width(400))
    there = Counter(map(tuple, legend.reshape(-1, 3).tolist()))
    assert [name for name, color in entries if there[color] < 20 * 20] == []
