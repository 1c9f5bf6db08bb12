"""What the arguments of a command line name, and the names of the results."""

import io
import os
from pathlib import PurePath

import pytest

from emanet_triton.errors import InputError
from emanet_triton.predict.sources import find_sources


def names(*arguments) -> list[str]:
    return [str(source.name) for source in find_sources(map(str, arguments)).found]


def test_a_folder_is_searched_recursively(photos):
    sources = find_sources([str(photos)])
    assert [str(s.name) for s in sources.found] == ["a", "b", "deep/c", "deep/d", "deep/er/e"]
    assert sources.folders == [photos]
    assert sources.notes == []
    assert not any(source.is_video for source in sources.found)


def test_videos_in_a_folder_are_left_out_and_counted(photos):
    (photos / "deep" / "x.mp4").touch()
    (photos / "y.AVI").touch()
    sources = find_sources([str(photos)])
    assert len(sources.found) == 5
    (note,) = sources.notes
    assert note == f"{photos}: leaves out 2 of its files, videos; name each to segment it"


def test_a_pattern_keeps_the_folders_behind_its_first_wildcard(photos):
    assert names(photos / "*.jpg") == ["b"]
    assert names(photos / "**" / "*") == ["a", "b", "deep/c", "deep/d", "deep/er/e"]
    assert names(photos / "d*" / "*.bmp") == ["deep/d"]


def test_a_pattern_leaves_out_earlier_results(photos, tmp_path):
    out, link = photos / "deep" / "out", tmp_path / "link"
    out.mkdir()
    (out / "a_overlay.png").write_bytes((photos / "a.png").read_bytes())
    link.symlink_to(out)
    loop = photos / "loop"
    loop.symlink_to(loop)
    pattern = str(photos / "**" / "*.png")
    for place in (out, link):
        sources = find_sources([pattern], place)
        assert [str(s.name) for s in sources.found] == ["a"]
        assert sources.notes == [f"{pattern}: leaves out 1 of its files, which lie in {place}"]
    for place in (None, photos, tmp_path, photos / "deep" / "none", loop):
        sources = find_sources([pattern], place)
        assert [str(s.name) for s in sources.found] == ["a", "deep/out/a_overlay"]
        assert sources.notes == []


def test_a_pattern_of_earlier_results_alone_is_refused(photos):
    pattern = f"{photos}/*/*.bmp"
    with pytest.raises(InputError) as raised:
        find_sources([pattern], photos / "deep")
    assert str(raised.value) == (
        f"{pattern}: the pattern matches no picture and no video outside {photos / 'deep'}"
    )


def test_a_file_is_a_picture_a_video_or_found_by_its_content(photos):
    video = photos / "v.MOV"
    video.touch()
    plain = photos / "plain"
    plain.write_bytes((photos / "b.jpg").read_bytes())
    found = find_sources(map(str, (photos / "a.png", video, plain))).found
    assert [(str(s.name), s.is_video) for s in found] == [
        ("a", False),
        ("v", True),
        ("plain", False),
    ]


def test_a_number_is_a_webcam_unless_a_file_has_this_name(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (source,) = find_sources(["0"]).found
    assert (source.path, source.name, source.is_video) == (0, PurePath("webcam0"), True)
    assert str(source) == "webcam 0"
    (tmp_path / "0").write_bytes((photos / "b.jpg").read_bytes())
    (source,) = find_sources(["0"]).found
    assert str(source.path) == "0"


def test_a_list_on_standard_input(photos, monkeypatch):
    lines = f"{photos / 'a.png'}\n\n{photos / 'deep'}\r\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert names("-", photos / "b.jpg") == ["a", "c", "d", "er/e", "b"]


def test_a_file_that_is_named_twice_counts_once(photos):
    (photos / "link.png").symlink_to(photos / "a.png")
    assert names(photos / "a.png", photos, photos / "deep" / ".." / "a.png") == [
        "a",
        "b",
        "deep/c",
        "deep/d",
        "deep/er/e",
    ]


def test_equal_names_are_told_apart(photos):
    (photos / "a.jpg").write_bytes((photos / "b.jpg").read_bytes())
    assert names(photos / "a.jpg", photos / "a.png", photos / "b.jpg") == ["a.jpg", "a.png", "b"]
    (photos / "deep" / "a.png").write_bytes((photos / "a.png").read_bytes())
    assert names(photos / "a.png", photos / "deep" / "a.png") == ["a.png", "deep/a.png"]


def test_no_name_leads_out_of_the_output_folder(photos, monkeypatch):
    (photos / "deep" / "a.png").write_bytes((photos / "a.png").read_bytes())
    monkeypatch.chdir(photos / "deep" / "er")
    assert names("../a.png", "../../a.png") == ["deep/a.png", "a.png"]


def test_a_list_may_name_files_that_are_not_utf8(tmp_path, photos, monkeypatch):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    os.link(photos / "b.jpg", path)
    stream = io.TextIOWrapper(io.BytesIO(path + b"\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdin", stream)
    assert names("-") == [os.fsdecode(b"caf\xe9")]


def test_names_that_cannot_be_told_apart_are_refused(photos):
    for name in ("a.jpg", "a.jpg.png"):
        (photos / name).write_bytes((photos / "b.jpg").read_bytes())
    with pytest.raises(InputError, match=r"would have the same name, a\.jpg; expected one run"):
        find_sources([str(photos)])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nothing.jpg", "there is no such file or folder; expected a picture, a folder"),
        ("*.jpg", "the pattern matches no picture and no video"),
        ("empty", "the folder has no picture; expected files that end with .bmp"),
        ("text", "neither a picture nor a video by its name or content; expected one of"),
        ("pipe", "cannot be read"),
        ("loop.txt", "cannot be read"),
        ("a\0/*.jpg", "cannot be read ("),
        ("99999", "there is no such file or folder"),
        ("-", "standard input is empty; expected a path in each line"),
    ],
)
def test_a_source_that_is_of_no_use_is_named(tmp_path, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(InputError) as raised:
        find_sources([argument])
    assert str(raised.value).startswith(f"{argument}: {message}")
    assert str(raised.value).count(f"{argument}: ") == 1
