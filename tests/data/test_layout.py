"""Which files belong to a split of a described data set."""

import os
from pathlib import Path

import pytest
from described_sets import LABEL, described, names_in, unusable, write

from emanet_triton import Dataset
from emanet_triton.data import layout
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError

ODD = ["with space", "große Straße 路", "{name}", "{split}", "a[0]*?", "a.b(c)|d", "$x", "\\d+"]


def test_odd_names(tmp_path):
    write(tmp_path, *(f"val/{name}" for name in ODD))
    assert names_in(described(), tmp_path) == sorted(ODD)
    for sample in described().find_samples(tmp_path):
        assert described().check(sample) == []
        assert described().prediction_name(sample) == f"{sample.name}.png"


def test_odd_folders_and_splits(tmp_path):
    dataset = described(images="a {x}/*{split}*/{name}.png", labels="b[1]/{split}/{name}.png")
    for split in ("v al", "{name}"):
        write(tmp_path, f"*{split}*/x", images="a {x}", labels="unused")
        write(tmp_path, f"{split}/x", images="unused", labels="b[1]")
        assert names_in(dataset, tmp_path, split) == ["x"]


def test_names_in_folders(tmp_path):
    write(tmp_path, "val/aachen/1", "val/bonn/1", "val/2", "val/x/y/z")
    samples = described().find_samples(tmp_path, "val")
    assert [sample.name for sample in samples] == ["2", "aachen_1", "bonn_1", "x_y_z"]
    assert samples[1].image == tmp_path / "photos" / "val" / "aachen" / "1.png"
    write(tmp_path, "val/aachen_1")
    assert unusable(described(), tmp_path) == (
        "the name 'aachen_1' is used in two folders, . and aachen"
    )


def test_a_long_name_stays_the_name_of_a_file(tmp_path):
    long = "/".join(["ö" * 50] * 3)
    write(tmp_path, f"val/{long}/a", f"val/{long}/b")
    names = names_in(described(), tmp_path)
    assert len(set(names)) == 2
    assert all(len(os.fsencode(name)) < 220 and name.startswith("ö" * 50) for name in names)


def test_a_name_that_comes_twice_in_a_pattern(tmp_path):
    dataset = described(images="photos/{name}/{name}.png", labels="masks/{name}.png")
    write(tmp_path, "a/a", "b/c", labels="unused")
    write(tmp_path, "a", images="unused")
    assert names_in(dataset, tmp_path) == ["a"]


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert sorted(layout._files(tmp_path, "")) == ["a.png", "loop"]


def test_hidden_files_are_left_out_and_links_are_followed(tmp_path):
    write(tmp_path / "real", "val/a", "val/._a", "val/.hidden/b")
    (tmp_path / "root").mkdir()
    for folder in ("photos", "masks"):
        (tmp_path / "root" / folder).symlink_to(tmp_path / "real" / folder)
        (tmp_path / "real" / folder / "val" / "loop").symlink_to(tmp_path / "real" / folder)
    assert names_in(described(), tmp_path / "root") == ["a"]


def test_without_a_split_in_the_patterns_each_split_is_everything(tmp_path):
    dataset = described(images="photos/{name}.png", labels="masks/{name}.png")
    write(tmp_path, "a", "b")
    assert names_in(dataset, tmp_path, "val") == names_in(dataset, tmp_path, "any") == ["a", "b"]


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_split_in_one_pattern_alone(tmp_path, part):
    other = "labels" if part == "images" else "images"
    dataset = described(**{part: "one/{split}/{name}.png", other: "all/{name}.png"})
    write(tmp_path, "train/a", "val/b", images="one", labels="one")
    write(tmp_path, "a", "b", images="all", labels="all")
    (sample,) = dataset.find_samples(tmp_path, "val")
    assert sample.name == "b"
    assert unusable(dataset, tmp_path, "test") == "it has no split 'test', it has: train, val"


def test_labels_beside_the_images(tmp_path):
    dataset = described(images="{name}.png", labels="{name}_mask.png")
    for name in ("a", "a_mask", "b", "b_mask"):
        write_png(tmp_path / f"{name}.png", LABEL)
    assert names_in(dataset, tmp_path) == ["a", "b"]


def test_files_without_a_partner(tmp_path):
    write(tmp_path, "val/a", "val/b", "val/c")
    (tmp_path / "photos/val/a.png").unlink()
    (tmp_path / "masks/val/b.png").unlink()
    assert unusable(described(), tmp_path) == (
        f"{tmp_path}/photos/val/b.png has no label\n{tmp_path}/masks/val/a.png has no image"
    )


def test_unusable_roots_and_splits(tmp_path):
    assert unusable(described(), tmp_path / "none") == (
        "there is no such folder; expected one with photos and masks"
    )
    assert unusable(described(images="{name}.jpg", labels="{name}.png"), tmp_path / "none") == (
        "there is no such folder; expected one with its files"
    )
    assert unusable(described(), tmp_path) == (
        "it has no split 'val': no file matches photos/{split}/{name}.png and "
        "masks/{split}/{name}.png"
    )
    write(tmp_path, "train/a", "test/b")
    for split in ("val", "..", "", ".", "train/..", "/", "a\0b", ".hidden"):
        assert unusable(described(), tmp_path, split).endswith("it has: test, train")
    write(tmp_path, "val/a", labels="other")
    assert unusable(described(), tmp_path) == "no file matches masks/val/{name}.png"


def listed(root: Path, content: bytes | str, **changes: object) -> Dataset:
    (root / "lists").mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (root / "lists" / "train.txt").write_bytes(data)
    return described(splits={"train": "lists/train.txt"}, **changes)


FOLDERS = {"images": "photos/{name}.png", "labels": "masks/{name}.png"}


@pytest.mark.parametrize("content", ["b/1\nö 2\n", "\ufeffb/1\r\n\r\nö 2"])
def test_a_list(tmp_path, content):
    write(tmp_path, "a", "b/1", "ö 2")
    dataset = listed(tmp_path, content, **FOLDERS)
    assert names_in(dataset, tmp_path, "train") == ["b_1", "ö 2"]
    assert unusable(dataset, tmp_path, "val") == (
        "it has no split 'val', it has: train" if True else ""
    )
    assert "lists/train.txt" in dataset.folders


def test_a_list_beside_splits_in_folders(tmp_path):
    write(tmp_path, "train/a", "train/b", "val/c")
    dataset = listed(tmp_path, "b\n")
    assert names_in(dataset, tmp_path, "train") == ["b"]
    assert names_in(dataset, tmp_path, "val") == ["c"]
    assert unusable(dataset, tmp_path, "x") == "it has no split 'x', it has: train, val"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "{list} is empty; expected one name a line"),
        ("\n\r\n", "{list} is empty; expected one name a line"),
        (b"\xff", "{list} is not UTF-8; expected one name a line"),
        ("a\nb\n\na\n", "{list}, line 4: 'a' is in line 1, too"),
        ("../a", "{list}, line 1: '../a' is no name below the root"),
        ("/a", "{list}, line 1: '/a' is no name below the root"),
        ("x//a", "{list}, line 1: 'x//a' is no name below the root"),
        ("a\0", "{list}, line 1: 'a\\x00' is no name below the root"),
        ("a\nc", "{root}/photos/c.png is missing; {list} names it in line 2"),
        ("a \n", "{root}/photos/a .png is missing; {list} names it in line 1"),
        ("b", "{root}/photos/b.png has no label"),
    ],
)
def test_a_wrong_list(tmp_path, content, problem):
    write(tmp_path, "a", "b")
    (tmp_path / "masks" / "b.png").unlink()
    dataset = listed(tmp_path, content, **FOLDERS)
    place = tmp_path / "lists" / "train.txt"
    assert unusable(dataset, tmp_path, "train") == problem.format(root=tmp_path, list=place)


def test_a_limit_leaves_out_the_missing_files_of_later_names(tmp_path):
    write(tmp_path, "a", "x/c")
    dataset = listed(tmp_path, "d\nx/c\na\nb\n", **FOLDERS)
    assert [s.name for s in dataset.find_samples(tmp_path, "train", limit=1)] == ["a"]
    with pytest.raises(InputError, match=r"b\.png is missing; .* names it in line 4$"):
        dataset.find_samples(tmp_path, "train", limit=2)
    assert "d.png is missing" in unusable(dataset, tmp_path, "train")
    (tmp_path / "photos/x/c.png").unlink()
    with pytest.raises(InputError) as raised:
        dataset.find_samples(tmp_path, "train", limit=4)
    assert str(raised.value).count(" is missing; ") == 3


def test_a_list_that_cannot_be_read(tmp_path):
    write(tmp_path, "a")
    dataset = listed(tmp_path, "a", **FOLDERS)
    place = tmp_path / "lists" / "train.txt"
    place.unlink()
    assert unusable(dataset, tmp_path, "train") == (
        f"{place} cannot be read (No such file or directory); expected one name a line"
    )
    place.mkdir()
    assert "cannot be read (Is a directory)" in unusable(dataset, tmp_path, "train")
