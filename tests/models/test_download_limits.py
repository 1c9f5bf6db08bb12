"""Downloads that must end, or go on without something: locks, pace, size, proxies, folders."""

import errno
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.request import Request

import pytest
import torch
from download_server import HALF, SHA256, assert_whole, fetch, part_of, refusal, serving

import emanet_triton.models.download as module
from emanet_triton import cache_folder
from emanet_triton.errors import InputError
from emanet_triton.models import connection
from emanet_triton.models.download import download, hub_file


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


@pytest.fixture
def destination(tmp_path) -> Path:
    return tmp_path / "hub" / "checkpoints" / "file.pth"


# Locks


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "ENOTSUP", "EINVAL"])
def test_a_file_system_without_locks(server, destination, monkeypatch, number):
    def flock(*_):
        raise OSError(getattr(errno, number), "no locks")

    monkeypatch.setattr(module.fcntl, "flock", flock)
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


# What servers and proxies answer


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (200, {"Content-Encoding": "gzip"}, "the answer is compressed (gzip)"),
        (206, {"Content-Range": "bytes 0-9/10"}, "the server answered 206, expected 200"),
        (204, {}, "the server answered 204, expected 200"),
        (
            302,
            {"Location": "file:///etc/passwd"},
            "HTTP Error 302: Found - Redirection to url 'file:///etc/passwd' is not",
        ),
        (302, {"Location": "ftp://127.0.0.1/x"}, "it redirects from http to ftp"),
        (302, {"Location": "/file.pth"}, "HTTP Error 302: The HTTP server returned a redirect"),
        (403, {}, "HTTP Error 403: Forbidden"),
    ],
    ids=["compressed", "range", "empty", "to-a-file", "to-ftp", "circle", "forbidden"],
)
def test_answers_that_are_not_the_file(server, destination, status, headers, reason):
    server.status, server.headers = status, headers
    assert refusal(server, destination).startswith(f"cannot be downloaded: {reason}")


def test_a_redirect_to_plain_http_is_refused():
    request = Request("https://example.org/x")
    with pytest.raises(ConnectionError, match=r"^it redirects from https to http$"):
        connection._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org")


def test_another_range_than_the_one_asked_for_starts_over(server, destination):
    server.close_after = HALF
    refusal(server, destination)
    server.close_after, server.range_shift = None, 1
    fetch(server, destination)
    assert_whole(destination)
    assert [asked for asked, _ in server.requests] == [None, f"bytes={HALF}-", None]


@pytest.fixture
def proxied(server, monkeypatch):
    """The server as a proxy, with a name and a password."""
    monkeypatch.delenv("no_proxy")
    host = server.url.removeprefix("http://").removesuffix("/file.pth")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://somebody:s3cret@{host}")
    return host


def test_a_proxy_is_used(server, destination, proxied):
    download("http://example.invalid/file.pth", destination, SHA256, progress=False)
    assert_whole(destination)
    assert server.paths == ["http://example.invalid/file.pth"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.invalid/file.pth", "HTTP Error 407: Proxy Authentication Required"),
        (
            "https://example.invalid/file.pth",
            "Tunnel connection failed: 407 Proxy Authentication Required",
        ),
    ],
    ids=["http", "https"],
)
def test_the_failure_of_a_proxy_is_named_without_its_password(
    server, destination, proxied, url, reason
):
    server.status = 407
    with pytest.raises(InputError) as error:
        download(url, destination, SHA256, progress=False)
    assert str(error.value).startswith(
        f"{url}: cannot be downloaded through the proxy {proxied}: {reason}. "
    )
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("proxy", ["http://somebody:s3cret@127.0.0.1:1", "somebody:s3cret@[:x"])
def test_a_proxy_that_is_not_there(destination, monkeypatch, proxy):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(InputError, match="cannot be downloaded through the proxy") as error:
        download("http://me:pass:w0rd@example.invalid/x", destination, SHA256, progress=False)
    assert "s3cret" not in str(error.value)
    assert "w0rd" not in str(error.value)
    assert str(error.value).startswith("http://example.invalid/x: ")


# Folders


def test_an_empty_file_in_the_place_is_replaced(server, destination):
    destination.parent.mkdir(parents=True)
    destination.touch()
    fetch(server, destination)
    assert_whole(destination)


def test_a_folder_in_the_place_is_left_to_the_reader(server, destination):
    destination.mkdir(parents=True)
    assert fetch(server, destination) == destination
    assert server.requests == []


def test_no_progress_bar_without_a_standard_error(server, destination, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    download(server.url, destination, SHA256)
    assert_whole(destination)


def test_the_hub_cache_is_used_where_it_can_be_written(tmp_path):
    assert hub_file("x.pth") == Path(torch.hub.get_dir()) / "checkpoints" / "x.pth"


def test_without_a_home_the_hub_cache_is_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", "~/.cache/torch/hub")  # as torch gives it then
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache_folder._instead_of.cache_clear()
    with pytest.warns(UserWarning, match="^~/.cache/torch/hub: cannot be written; "):
        found = hub_file("x.pth")
    assert found == tmp_path / f"emanet_triton-{os.getuid()}" / "hub" / "checkpoints" / "x.pth"


def test_a_file_in_a_hub_cache_that_is_read_only(tmp_path, monkeypatch):
    found = Path(torch.hub.get_dir()) / "checkpoints" / "x.pth"
    found.parent.mkdir(parents=True)
    found.write_text("weights")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert hub_file("x.pth") == found


def test_a_password_in_an_address_is_not_repeated(destination, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError) as error:
        download("http://me:w0rd@example.invalid/x", destination, SHA256, progress=False)
    assert str(error.value).startswith(
        "http://example.invalid/x: cannot be downloaded: nonnumeric port: '***@example.invalid'."
    )
