"""A later run uses only those parts of a partial result that are undamaged and still valid."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from fuzz import partial as fuzz
from fuzz.partial import SETTINGS, STAMPS, VERSIONS, content_of, make, seal

from emanet_triton.data.cityscapes import Sample
from emanet_triton.eval import partial
from emanet_triton.eval.partial import PartialResult, stamps

COUNTS = torch.full((1, 19, 19), 5)


def write(*names: str) -> PartialResult:
    """A file with one batch for each name."""
    result = make()
    for name in names:
        result.add([name], COUNTS, 2.0)
    result.write()
    return result


def taken(result: PartialResult | None = None, **options) -> tuple[list[str], int, float, str]:
    """The names, cell counts and seconds that a later run uses, and its text ``left_out``."""
    result = result or make()
    names, counts, seconds = result.earlier(**options)
    assert (counts == counts[0, 0, 0]).all()
    return sorted(names), int(counts[0, 0, 0]), seconds, result.left_out


def test_finished_images_are_taken_over():
    write("a", "b")
    write("c")
    assert taken() == (["a", "b", "c"], 15, 4.0, "")


def test_an_image_counts_once():
    write("a", "b")
    write("b", "c")
    assert taken()[:2] == (["a", "b", "c"], 15)


def sealed(change):
    """Change the content, and write the checksum that fits."""
    return lambda file: file.write_text(seal(change(content_of(file))))


def batch(**changes):
    def change(content):
        content["finished"][0] |= changes
        return content

    return sealed(change)


def counts(number, rows=19):
    return [[[number] * 19] * rows]


def link(file):
    file.rename(file.with_suffix(".elsewhere"))
    file.symlink_to(file.with_suffix(".elsewhere"))


DAMAGE = {
    "empty": lambda file: file.write_text(""),
    "one digit": lambda file: file.write_text(file.read_text().replace("[[[5", "[[[7", 1)),
    "half": lambda file: file.write_text(file.read_text()[:500]),
    "nested": lambda file: file.write_text("[" * 100_000),
    "no text": lambda file: file.write_bytes(b"\xff\xfe"),
    "a list": lambda file: file.write_text("[]"),
    "a small number": lambda file: file.write_text("5"),
    "null": lambda file: file.write_text("null"),
    "a number": lambda file: file.write_text("9" * 5000),
    "five gigabytes": lambda file: os.truncate(file, 5 * 10**9),
    "fifo": lambda file: (file.unlink(), os.mkfifo(file)),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "link": link,
    "a part is missing": sealed(lambda content: content | {"finished": [{}]}),
    "no batches": sealed(lambda content: content | {"finished": 3}),
    "time": sealed(lambda content: content | {"seconds": float("nan")}),
    "giant time": sealed(lambda content: content | {"seconds": 10**400}),
    "time in words": sealed(lambda content: content | {"seconds": "long"}),
    "other settings": sealed(lambda content: content | {"settings": {"samples": ["z"]}}),
    "unknown image": batch(images=["z"]),
    "no image": batch(images=[]),
    "a name for names": batch(images="a"),
    "an image twice": batch(images=["a", "a"]),
    "numbers for names": batch(images=[1]),
    "lists for names": batch(images=[["a"]]),
    "negative": batch(counts=counts(-1)),
    "more than the pixels": batch(counts=counts(2**60)),
    "a giant number": batch(counts=counts(10**30)),
    "fractions": batch(counts=counts(0.5)),
    "texts": batch(counts=counts("5")),
    "another shape": batch(counts=counts(5, rows=18)),
    "ragged": batch(counts=[[[5], [5, 5]]]),
    "no counts": batch(counts=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_left_out(damage):
    write("b")
    DAMAGE[damage](write("a")._file)
    assert taken() == (["b"], 5, 2.0, "1 damaged file")


def test_without_memory_a_file_is_left_out(monkeypatch):
    write("a")

    def fail(text):
        raise MemoryError

    monkeypatch.setattr(partial, "json", SimpleNamespace(dumps=json.dumps, loads=json.loads))
    result = make()
    monkeypatch.setattr(partial.json, "loads", fail)
    assert taken(result) == ([], 0, 0, "1 damaged file")


def test_a_file_of_other_versions_is_left_out():
    write("a")
    write("b")
    newer = PartialResult(SETTINGS, versions={"torch": "3"}, stamps=STAMPS)
    assert taken(newer) == ([], 0, 0, "2 files of other versions")


def test_only_images_whose_files_changed_are_left_out():
    write("a", "b", "c")
    changed = PartialResult(SETTINGS, versions=VERSIONS, stamps=STAMPS | {"b": [10, 21, 30, 40]})
    assert taken(changed) == (
        ["a", "c"],
        10,
        pytest.approx(4 / 3),
        "1 image of a batch whose files have changed",
    )


def test_only_images_whose_pictures_are_there_are_taken_over():
    result = make()
    for name in ("a", "b", "c"):
        result.add([name], COUNTS, 2.0, [[7, 8]])
    result.write()
    there = {"a": [7, 8], "b": [7, 9], "c": []}
    got = taken(drawn=there.get)
    assert got[:2] == (["a"], 5)
    assert got[3] == "2 images of batches whose pictures are missing or have changed"
    assert taken()[:2] == (["a", "b", "c"], 15)


def test_stamps_are_of_image_and_label(tmp_path):
    sample = Sample("a", tmp_path / "image", tmp_path / "label")
    for path, size in ((sample.image, 3), (sample.label, 5)):
        path.write_bytes(b"x" * size)
        os.utime(path, ns=(7, 7 + size))
    assert stamps([sample]) == {"a": [3, 10, 5, 12]}
    sample.label.unlink()
    assert stamps([sample]) == {"a": [3, 10]}


class TwoMachines:
    """Ranks that do not share a disk: this one has read its files, the other ``theirs``."""

    rank = 1

    def __init__(self, theirs):
        self.theirs = theirs

    def gather(self, value):
        return [self.theirs, value]

    def sum(self, tensor):
        self.own = tensor
        return tensor


def test_files_of_other_machines_are_taken_over_and_count_once():
    write("a", "b")
    ranks = TwoMachines([[["b"], ["c"]], {"x.json": 3.0}, "5"])
    names, _, seconds = make().earlier(ranks)
    assert names == {"a", "b", "c"}
    assert int(ranks.own[0, 0, 0]) == 5  # of "a"; the other counts the others
    assert seconds == 5.0


def test_ranks_of_one_run_took_their_time_together():
    """Two runs of two ranks: 4 and 3 seconds."""
    for start, (one, other) in (("5", (2.0, 4.0)), ("6", (3.0, 1.0))):
        for rank, names, seconds in ((0, ["a"], one), (1, ["b"], other)):
            result = PartialResult(SETTINGS, rank, versions=VERSIONS, stamps=STAMPS)
            ranks = TwoMachines([[], {}, start])
            result.earlier(ranks)
            result.add(names, COUNTS, seconds)
            result.write()
    assert len(list(make().folder.iterdir())) == 4
    assert taken()[0::2] == (["a", "b"], 7.0)


def test_what_nobody_came_back_for_is_removed():
    write("a")
    folder = make().folder
    month = time.time() - 31 * 24 * 3600
    forgotten, recent = (folder.with_name(digit * 16) for digit in "01")
    other = folder.with_name("other")
    for each, age in ((forgotten, month), (recent, time.time()), (other, month)):
        each.mkdir()
        (each / "1-0.json").write_text("")
        (each / ".1-0.json.5.6.tmp").write_text("")
        for path in (*each.iterdir(), each):
            os.utime(path, (age, age))
    make().discard_forgotten()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "1" * 16, "other"}
    make().discard()
    assert not folder.exists()


@pytest.mark.parametrize("seed", range(60))
def test_fuzz(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # restored at the end
    assert fuzz.attempt(seed, tmp_path) in ("right", "refused")
