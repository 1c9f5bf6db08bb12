"""Files are written whole, through links and into streams; planted links are refused."""

import errno
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from emanet_triton import files
from emanet_triton.errors import InputError
from emanet_triton.files import (
    is_stream,
    open_plain,
    read_plain,
    remove_leftovers,
    require_folder,
    require_writable,
    temporary_beside,
    write_whole,
)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_two_threads_write_one_file(tmp_path, monkeypatch):
    """Both writers have written before one of them replaces the file."""
    both, replace = threading.Barrier(2, timeout=10), Path.replace

    def together(self, target):
        both.wait()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_whole, [tmp_path / "file"] * 2, (b"one", b"two")))
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() in (b"one", b"two")


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link, second = tmp_path / "folder" / "real", tmp_path / "link", tmp_path / "second"
    target.write_text("earlier")
    link.symlink_to("folder/real")
    second.symlink_to(link)
    write_whole(second, b"new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(target.parent) == ["real"]


def test_the_target_of_a_dangling_link_is_made(tmp_path):
    (tmp_path / "link").symlink_to("made")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "made").read_bytes() == b"new"


def test_links_in_a_circle(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(OSError, match=f"^.Errno {errno.ELOOP}. .*: '{link}'$"):
        write_whole(link, b"new")
    with pytest.raises(InputError, match=rf"^{link}: cannot be written \(Too many levels"):
        require_writable(link)


def test_permissions_of_an_earlier_file_are_kept_and_a_new_one_heeds_the_umask(tmp_path, umask):
    earlier, new = tmp_path / "earlier", tmp_path / "new"
    earlier.write_text("")
    earlier.chmod(0o604)
    for path in (earlier, new):
        write_whole(path, b"content")
    assert [mode(path) for path in (earlier, new)] == [0o604, 0o640]


def test_a_fifo_is_written_and_stays(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    require_writable(fifo)  # without waiting for a reader
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(fifo.read_bytes)
        write_whole(fifo, b"content")
    assert read.result(timeout=10) == b"content"
    assert is_stream(fifo)
    assert names(tmp_path) == ["fifo"]


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_an_open_file_is_written_where_it_stands(tmp_path, form):
    with (tmp_path / "file").open("wb+") as file:
        file.write(b"before ")
        file.flush()
        path = Path(form.format(file.fileno()))
        assert is_stream(path)
        require_writable(path)
        write_whole(path, b"content")
    assert (tmp_path / "file").read_bytes() == b"before content"


def test_standard_output_is_written_and_the_device_stays():
    code = (
        "import pathlib, emanet_triton.files as f;"
        "f.write_whole(pathlib.Path('/dev/stdout'), b'a');"
        "f.write_whole(pathlib.Path('/dev/null'), b'b')"
    )
    before = [Path(path).lstat().st_mode for path in ("/dev/stdout", "/dev/null")]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert (done.stdout, done.stderr) == (b"a", b"")
    assert [Path(path).lstat().st_mode for path in ("/dev/stdout", "/dev/null")] == before


def test_a_full_device_is_reported_with_the_path():
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/dev/full'$"):
        write_whole(Path("/dev/full"), b"x")


def test_a_full_disk_leaves_the_earlier_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("earlier")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/.else.tmp")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=rf"^\[Errno 28\] No space left on device: '{path}'$"):
        write_whole(path, b"new")
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["file"]


def test_a_file_that_a_container_mounts_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("a longer earlier text")
    inode = path.stat().st_ino

    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    write_whole(path, b"new")
    assert (path.read_text(), path.stat().st_ino) == ("new", inode)
    assert names(tmp_path) == ["file"]


def test_a_planted_temporary_file_is_not_followed(tmp_path, monkeypatch):
    precious, planted = tmp_path / "precious", tmp_path / ".file.tmp"
    precious.write_text("precious")
    planted.symlink_to(precious)
    monkeypatch.setattr(files, "temporary_beside", lambda path: planted)
    with pytest.raises(OSError, match="File exists"):
        write_whole(tmp_path / "file", b"new")
    assert precious.read_text() == "precious"


def test_temporary_names_differ_and_fit(tmp_path):
    path = tmp_path / ("é" * 127)  # 254 bytes, of at most 255
    assert temporary_beside(path) != temporary_beside(path)
    write_whole(path, b"content")
    assert path.read_bytes() == b"content"


def _fifo(path: Path, other: Path) -> None:
    os.mkfifo(path)


PLANTED = {
    "link": lambda path, other: path.symlink_to(other),
    "second-name": lambda path, other: path.hardlink_to(other),
    "fifo": _fifo,
}


@pytest.mark.parametrize("kind", PLANTED)
def test_open_plain_takes_plain_files_only(tmp_path, kind):
    other = tmp_path / "other"
    other.write_text("precious")
    PLANTED[kind](tmp_path / "planted", other)
    with pytest.raises(OSError, match=r"Is a symbolic link|Is not a regular file|No such device"):
        open_plain(tmp_path / "planted", os.O_WRONLY | os.O_CREAT)
    assert other.read_text() == "precious"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_read_plain_reads_plain_files_only(tmp_path, kind):
    other = tmp_path / "other"
    other.write_text("content")
    assert [read_plain(other, most) for most in (3, 99)] == [b"con", b"content"]
    PLANTED[kind](tmp_path / "planted", other)
    with pytest.raises(OSError, match=r"Is a symbolic link|Is not a regular file"):
        read_plain(tmp_path / "planted", 99)


def test_leftovers_of_a_killed_writer_go_with_the_next_write(tmp_path):
    code = (
        "import pathlib, sys, emanet_triton.files as f;"
        "f.temporary_beside(pathlib.Path(sys.argv[1])).write_text('half')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "picture.png")], check=True)
    mine = temporary_beside(tmp_path / "file")  # of a live process
    mine.write_text("half")
    strange = tmp_path / ".notes.1234.tmp"
    strange.write_text("somebody's")
    assert len(names(tmp_path)) == 3
    write_whole(tmp_path / "other", b"")
    assert names(tmp_path) == sorted([mine.name, strange.name, "other"])


def test_leftovers_go_when_a_folder_is_checked(tmp_path):
    old = tmp_path / ".file.emanet-00000000-1-00000000.tmp"
    old.touch()
    os.utime(old, (0, 0))
    require_folder(tmp_path)
    assert names(tmp_path) == []


def test_leftovers_of_another_machine_go_when_they_are_old(tmp_path):
    new, old = (tmp_path / f".file.emanet-00000000-1-0000000{i}.tmp" for i in range(2))
    folder = tmp_path / ".scenes.emanet-00000000-1-00000002.tmp"
    folder.mkdir()
    (folder / "half").touch()
    for path in (new, old):
        path.touch()
    for path in (old, folder):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [new.name]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "{}: expected a file to write, this is a folder"),
        ("read-only", "{}: cannot be written (Permission denied)"),
    ],
)
def test_require_writable_refuses(tmp_path, monkeypatch, kind, message):
    path = tmp_path / "out"
    path.mkdir() if kind == "folder" else path.touch(mode=0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(InputError) as error:
        require_writable(path)
    assert str(error.value) == message.format(path)


def test_require_writable_leaves_what_is_there(tmp_path):
    path = tmp_path / "new" / "out"
    require_writable(path)
    assert names(tmp_path / "new") == []
    path.write_text("earlier")
    require_writable(path)
    assert path.read_text() == "earlier"
