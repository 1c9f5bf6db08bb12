"""Which pictures give int8 its ranges."""

from pathlib import Path

import numpy as np
import pytest

from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError
from emanet_triton.inference.calibration import (
    CALIBRATION_IMAGES,
    evenly_spread,
    named_calibration,
    readable_calibration,
)


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of 2x3 pixels, in two folders, beside a hidden picture and a text."""
    (tmp_path / "inner").mkdir()
    for i in range(20):
        place = tmp_path / "inner" if i >= 10 else tmp_path
        write_png(place / f"{i:02d}.png", np.full((2, 3, 3), i, np.uint8))
    write_png(tmp_path / ".hidden.png", np.zeros((2, 3, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("number", "taken"),
    [
        (0, []),
        (1, [0]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8]),
        (500, [0, 71, 142, 213, 285, 356, 427, 499]),
    ],
)
def test_evenly_spread(number, taken):
    assert evenly_spread(range(number)) == taken


def test_a_folder_a_pattern_and_a_picture(folder):
    whole = named_calibration(str(folder))
    assert [int(path.stem) for path in whole.paths] == [0, 2, 5, 8, 10, 13, 16, 19]
    assert [image[0, 0, 0] for image in whole.images()] == [0, 2, 5, 8, 10, 13, 16, 19]
    assert str(whole) == f"ranges from {CALIBRATION_IMAGES} images ({folder})"
    pattern = named_calibration(str(folder / "**" / "*3.*"))
    assert [path.stem for path in pattern.paths] == ["03", "13"]
    one = named_calibration(str(folder / "04.png"))
    assert one.paths == (folder / "04.png",)
    assert str(one) == f"ranges from 1 image ({folder / '04.png'})"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("none", "--calibration none: there is no such file or folder; expected a picture, a fol"),
        ("*.jpg", "--calibration *.jpg: the pattern matches no picture"),
        ("empty", "--calibration empty: the folder has no picture; expected files that end "),
        ("notes.txt", "--calibration notes.txt: not a readable picture (it is of another kind)"),
        ("", "--calibration '': there is no such file or folder"),
        ("x" * 300, "--calibration xxx"),
    ],
    ids=lambda value: value[:10],
)
def test_no_picture(folder, monkeypatch, named, message):
    monkeypatch.chdir(folder)
    Path("empty").mkdir()
    with pytest.raises(InputError) as raised:
        named_calibration(named)
    assert str(raised.value).startswith(message)


def test_damaged_pictures_of_a_run_are_left_out(folder):
    damaged = folder / "00.png"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    paths = sorted(folder.glob("0*.png"))
    calibration = readable_calibration(paths[:3], "this run")
    assert calibration.paths == tuple(paths[1:3])
    with pytest.raises(InputError, match=r"int8 finds no picture for its ranges: .*00\.png: "):
        readable_calibration([damaged], "this run")
