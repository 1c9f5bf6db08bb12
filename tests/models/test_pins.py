"""The hash of a file for which nobody has published one."""

import hashlib
import subprocess
from dataclasses import replace

import pytest
import torch
from checkpoint_files import save, weights
from download_server import serving

from emanet_triton.errors import InputError
from emanet_triton.models import zoo
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.chosen import read_chosen
from emanet_triton.models.entries import OFFICIAL
from emanet_triton.models.pins import check_pin, pin_path, pinned

NAME = "emanet_resnet50os8_voc"


@pytest.fixture
def path(tmp_path):
    return save(weights(), tmp_path / "file.pth")


def test_the_hash_is_noted_once_and_checked_from_then_on(path):
    assert pinned(path) is None
    check_pin(read_checkpoint(path))
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pinned(path) == digits
    subprocess.run(["sha256sum", "--check", pin_path(path).name], cwd=path.parent, check=True)
    check_pin(read_checkpoint(path))

    save({key: value + 1 for key, value in weights().items()}, path)
    with pytest.raises(InputError, match=f"expected {digits[:8]} as noted in file.pth.sha256"):
        check_pin(read_checkpoint(path))
    pin_path(path).unlink()
    check_pin(read_checkpoint(path))


@pytest.mark.parametrize("text", [b"", b"abc", b"\xff\n", b"0" * 63 + b"\n", b"0" * 64 + b" \n"])
def test_a_damaged_note_is_named(path, text):
    pin_path(path).write_bytes(text)
    with pytest.raises(InputError, match=r"file\.pth\.sha256: is damaged; expected the SHA-256"):
        check_pin(read_checkpoint(path))


def test_a_note_that_cannot_be_read_or_written(path, monkeypatch):
    pin_path(path).mkdir()
    with pytest.raises(InputError, match=r"file\.pth\.sha256: cannot be read"):
        pinned(path)
    pin_path(path).rmdir()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("emanet_triton.models.pins.write_whole", refuse)
    with pytest.warns(UserWarning, match=r"cannot be written \(Permission denied\); no hash"):
        check_pin(read_checkpoint(path))


def test_a_published_file_is_pinned_when_it_is_first_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    source = save(weights(), tmp_path / "source.pth")
    with serving() as server:
        server.body = source.read_bytes()
        monkeypatch.setitem(zoo.ZOO, NAME, replace(zoo.ZOO[NAME], url=server.url))
        assert zoo.model_info(NAME).sha256 is None
        first = zoo.read_published(NAME)
        assert zoo.model_info(NAME).sha256 == first.sha256
        assert len(server.requests) == 1
    assert first.path == tmp_path / "hub/checkpoints" / f"{NAME}.pth"
    assert zoo.read_published(NAME).sha256 == first.sha256
    save({key: value + 1 for key, value in weights().items()}, first.path)
    with pytest.raises(InputError, match="the file is damaged or another one"):
        zoo.read_published(NAME)


def test_a_model_without_an_address_says_where_its_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    place = tmp_path / "checkpoints/emanet_r101_voc_official.pth"
    with pytest.raises(InputError, match=r"from https://github\.com/XiaLiPKU/EMANet") as error:
        zoo.read_published(OFFICIAL)
    assert str(error.value).startswith(f"{place}: no such file; expected the checkpoint of")


@pytest.mark.parametrize("form", ["{} *{}\n", "{}  {}"])
def test_notes_of_sha256sum(path, form):
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    pin_path(path).write_text(form.format(digits.upper(), path.name))
    check_pin(read_checkpoint(path))
    pin_path(path).write_text(form.format(digits, "other.pth"))
    with pytest.raises(InputError, match=r"file\.pth\.sha256: is the note of other\.pth; expected"):
        check_pin(read_checkpoint(path))


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_note_may_hold_the_hash_alone(path, end):
    digits = hashlib.sha256(path.read_bytes()).hexdigest()
    pin_path(path).write_text(digits + end)
    check_pin(read_checkpoint(path))
    pin_path(path).write_text("0" * 64 + end)
    with pytest.raises(InputError, match=r"expected 00000000 as noted in file\.pth\.sha256"):
        check_pin(read_checkpoint(path))


def test_a_note_may_hold_a_path(path):
    command = ["sha256sum", path]
    pin_path(path).write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert str(path) in pin_path(path).read_text()
    check_pin(read_checkpoint(path))


@pytest.mark.parametrize("name", [NAME, "final"])
def test_a_path_that_a_user_gives_is_compared_but_not_noted(tmp_path, name):
    path = save(weights(), tmp_path / f"{name}.pth")
    read_chosen(str(path), NAME)
    assert not pin_path(path).exists()
    pin_path(path).write_text(f"{'0' * 64}  {path.name}\n")
    with pytest.raises(InputError, match="the file is damaged or another one"):
        read_chosen(str(path), NAME)


def test_a_folder_may_have_the_names_of_the_addresses(tmp_path):
    model = "emanet_resnet50_os8_voc12aug_512x512_40k"
    assert zoo.published_path(model, tmp_path) == tmp_path / f"{model}.pdparams"
    place = tmp_path / model / "model.pdparams"
    place.parent.mkdir()
    place.touch()
    assert zoo.published_path(model, tmp_path) == place
    assert zoo.name_of_path(place) == model
