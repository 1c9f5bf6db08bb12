"""Downloads that must end, or go on without something: locks, planted files, pace, size."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from download_server import HALF, SHA256, assert_whole, fetch, part_of, refusal

import emanet_triton.models.download as module
from emanet_triton.errors import InputError
from emanet_triton.models import connection
from emanet_triton.models.download import download

# Locks


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL"])
def test_a_file_system_without_locks(server, destination, monkeypatch, number):
    def flock(*_):
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)  # which filelock calls
    server.close_after = HALF
    message = refusal(server, destination)
    assert "The file can also be fetched by hand" in message
    assert [path.name for path in destination.parent.iterdir()] == []
    server.close_after = None
    fetch(server, destination)
    assert_whole(destination)


def test_a_lock_of_another_user_is_done_without(server, destination, monkeypatch):
    def refused(path, flags, plain=module.open_plain):
        if path.suffix == ".lock":
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(path, flags)

    monkeypatch.setattr(module, "open_plain", refused)
    fetch(server, destination)
    assert_whole(destination)


HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(destination):
    """Another process that holds the lock and does nothing."""
    destination.parent.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(destination.with_name("file.pth.lock"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_a_process_that_holds_the_lock_and_does_nothing(
    server, destination, monkeypatch, holder, capsys
):
    monkeypatch.setattr(module, "_STUCK", 0.3)
    with pytest.raises(InputError) as error:
        download(server.url, destination, SHA256)
    lock = destination.with_name("file.pth.lock")
    assert f"another process holds {lock}, and its download has not grown for 0.3 s" in str(
        error.value
    )
    assert capsys.readouterr().err == "waiting for another process that downloads file.pth\n"
    assert server.requests == []


def test_the_lock_of_a_dead_process_is_free(server, destination, holder):
    waiting = threading.Thread(target=fetch, args=(server, destination))
    waiting.start()
    waiting.join(timeout=0.3)
    assert waiting.is_alive()
    holder.kill()
    waiting.join(timeout=20)
    assert_whole(destination)


# Planted links


@pytest.mark.parametrize("suffix", [".part", ".lock"])
def test_planted_links_are_not_followed(server, destination, tmp_path, suffix):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    destination.parent.mkdir(parents=True)
    planted = destination.with_name(f"file.pth{suffix}")
    planted.symlink_to(precious)
    assert refusal(server, destination).startswith(
        f"cannot be downloaded: [Errno 40] Is a symbolic link: '{planted}'."
    )
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("suffix", [".part", ".lock"])
@pytest.mark.parametrize("kind", ["hard-link", "fifo"])
def test_planted_files_of_other_kinds_are_refused(server, destination, tmp_path, suffix, kind):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    destination.parent.mkdir(parents=True)
    planted = destination.with_name(f"file.pth{suffix}")
    if kind == "fifo":
        os.mkfifo(planted)
    else:
        planted.hardlink_to(precious)
    assert refusal(server, destination).startswith(
        "cannot be downloaded: [Errno 22] Is not a regular file with one name: "
        f"'{planted}'. The next try goes on from what has arrived; the file can also be"
    )
    assert planted.exists()
    assert precious.read_text() == "precious"


# Pace and size


def test_a_body_that_trickles_ends(server, destination, monkeypatch):
    monkeypatch.setattr(connection, "_WINDOW", 0.3)
    server.pause = 0.02
    assert re.match(
        r"cannot be downloaded: only \d+ bytes came in \d s\. ", refusal(server, destination)
    )
    assert 0 < part_of(destination).stat().st_size < 100


def test_headers_that_trickle_end(destination, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(connection, "_WINDOW", 0.3)

    def trickle(client: socket.socket) -> None:
        with suppress(OSError), client:
            for byte in b"HTTP/1.1 200 OK\r\n" + b"X" * 200:
                client.sendall(bytes([byte]))
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: trickle(server.accept()[0]))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file.pth"
        with pytest.raises(InputError, match=r"cannot be downloaded: only \d+ bytes came in"):
            download(url, destination, SHA256, progress=False)


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_that_is_too_large(server, destination, monkeypatch, declared):
    monkeypatch.setattr(module, "_MOST_BYTES", HALF)
    server.declared_length = declared
    message = refusal(server, destination)
    assert f"cannot be downloaded: [Errno 27] it is larger than {HALF} bytes." in message
    assert part_of(destination).stat().st_size == 0
