"""Every output that cannot be written is refused before anything is computed."""

import json
import os
from pathlib import Path

import pytest
import tiny_eval

from emanet_triton.eval.__main__ import main


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLACES = {
    "images": "leftImg8bit/val/aachen",
    "labels": "gtFine/val/bochum",
    "new-city": "leftImg8bit/val/new",
    "the-tree": "gtFine",
}


@pytest.mark.parametrize("option", ["--save-predictions", "--save-overlays", "--json"])
@pytest.mark.parametrize("place", PLACES)
def test_output_inside_the_data_set(fails, city, ckpt, tmp_path, option, place):
    before = files_of(tmp_path)
    (tmp_path / "link").symlink_to(city)
    given = tmp_path / "link" / PLACES[place]
    given = given / "out.json" if option == "--json" else given
    tree = city / PLACES[place].split("/")[0]
    assert fails("--ckpt", ckpt, "--data", city, option, given) == (
        f"error: {option} {given}: lies in the data set's {tree}; expected another place\n"
    )
    assert files_of(tmp_path) == before
    assert not (city / PLACES["new-city"]).exists()


@pytest.mark.parametrize("option", ["--save-predictions", "--save-overlays"])
def test_output_into_a_city_that_lies_elsewhere(fails, city, ckpt, tmp_path, option):
    elsewhere = tmp_path / "elsewhere"
    (city / "leftImg8bit" / "val" / "aachen").rename(elsewhere)
    (city / "leftImg8bit" / "val" / "aachen").symlink_to(elsewhere)
    before = files_of(tmp_path)
    assert fails("--ckpt", ckpt, "--data", city, option, elsewhere) == (
        f"error: {option} {elsewhere}: holds files of the data set; expected another\n"
    )
    assert files_of(tmp_path) == before


def test_output_into_a_folder_of_links_to_the_images(fails, city, ckpt, tmp_path):
    image, folder = tiny_eval.image_of(city, "leftImg8bit"), tmp_path / "links"
    folder.mkdir()
    (folder / image.name).symlink_to(image)
    before = files_of(tmp_path)
    assert fails("--ckpt", ckpt, "--data", city, "--save-predictions", folder) == (
        f"error: --save-predictions: {folder / image.name} would overwrite {image}; "
        "expected another place\n"
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("link", [False, True], ids=["same", "link"])
def test_one_folder_for_both_kinds_of_pictures(fails, city, ckpt, tmp_path, link):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to("one")
    one, two = tmp_path / "one", tmp_path / ("two" if link else "one")
    name = tiny_eval.image_of(city, "leftImg8bit").name
    given = ("--save-predictions", one, "--save-overlays", two)
    assert fails("--ckpt", ckpt, "--data", city, *given) == (
        f"error: --save-overlays: {two / name} would overwrite {one / name}; "
        "expected another place\n"
    )


def test_a_pipe_in_the_place_of_a_picture(fails, city, ckpt, tmp_path):
    picture = tmp_path / "out" / tiny_eval.image_of(city, "leftImg8bit").name
    picture.parent.mkdir()
    os.mkfifo(picture)
    assert fails("--ckpt", ckpt, "--data", city, "--save-predictions", picture.parent) == (
        f"error: --save-predictions: {picture} is no file; expected a place for a picture\n"
    )


def test_a_folder_of_any_name_beside_the_pictures(city, ckpt, tmp_path):
    (tmp_path / "out" / "x").mkdir(parents=True)
    command = "--ckpt", ckpt, "--data", city, "--save-predictions", tmp_path / "out"
    assert main([str(argument) for argument in command]) == 0


def test_json_in_the_place_of_a_picture(fails, city, ckpt, tmp_path):
    picture = tmp_path / "out" / tiny_eval.image_of(city, "leftImg8bit").name
    given = ("--save-overlays", tmp_path / "out", "--json", picture)
    assert fails("--ckpt", ckpt, "--data", city, *given) == (
        f"error: --json: {picture} would overwrite {picture}; expected another place\n"
    )


def test_json_in_the_place_of_the_checkpoint(fails, city, ckpt, tmp_path):
    (tmp_path / "link.json").symlink_to(ckpt)
    before = files_of(tmp_path)
    err = fails("--ckpt", ckpt, "--data", city, "--json", tmp_path / "link.json")
    assert err == (
        f"error: --json: {tmp_path / 'link.json'} would overwrite {ckpt}; expected another place\n"
    )
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "content", ["PK\3\4", '{"model": "tiny"}', "[1]"], ids=["checkpoint", "object", "list"]
)
def test_json_replaces_only_an_earlier_report(fails, city, ckpt, tmp_path, content):
    kept = tmp_path / "keep.pth"
    kept.write_text(content)
    assert fails("--ckpt", ckpt, "--data", city, "--json", kept) == (
        f"error: --json {kept}: exists and is no JSON report of emanet-triton eval; expected a new "
        "name, or such a file, which is replaced\n"
    )
    assert kept.read_text() == content


def test_json_replaces_a_report_a_list_of_reports_and_an_empty_file(city, ckpt, tmp_path):
    out = tmp_path / "out.json"
    out.touch()
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out)]
    assert main(command) == 0
    written = json.loads(out.read_text())
    for text in (out.read_text(), json.dumps(written), json.dumps([written] * 2, indent=1)):
        out.write_text(text)
        assert main([*command, "--limit", "1"]) == 0
        assert json.loads(out.read_text())["images"] == 1


def test_control_characters_of_names_are_escaped(fails, city, ckpt):
    image = tiny_eval.image_of(city, "leftImg8bit")
    image.rename(image.with_name("a\x1b[2J\n\rb_leftImg8bit.png"))
    err = fails("--ckpt", ckpt, "--data", city)
    assert "a\\x1b[2J\\n\\rb_leftImg8bit.png has no label" in err
    assert len(err[err.index("error: ") :].splitlines()) == 3


@pytest.mark.parametrize("option", ["--json", "--save-predictions", "--save-overlays"])
def test_unwritable_output(fails, city, ckpt, tmp_path, option):
    (tmp_path / "file").write_text("")
    err = fails("--ckpt", ckpt, "--data", city, option, tmp_path / "file" / "out")
    assert f"{tmp_path / 'file'}" in err
    assert "expected a folder that can be written" in err


def test_json_that_is_a_folder(fails, city, ckpt, tmp_path):
    err = fails("--ckpt", ckpt, "--data", city, "--json", tmp_path)
    assert f"{tmp_path}: expected a file to write, this is a folder" in err
