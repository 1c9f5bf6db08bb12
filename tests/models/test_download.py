"""Downloads over connections that break, resumed and verified."""

import hashlib
import os
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_files import save, weights
from download_server import (
    BODY,
    HALF,
    SHA256,
    assert_whole,
    fetch,
    part_of,
    refusal,
    serving,
)

import emanet_triton.models.download as module
from emanet_triton import cache_folder
from emanet_triton.errors import InputError
from emanet_triton.models import connection
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.download import download, hub_file


def test_whole(server, destination, capsys):
    assert fetch(server, destination) == destination
    assert_whole(destination)
    assert server.requests == [(None, len(BODY))]
    assert capsys.readouterr().err == ""


def test_progress_goes_to_stderr(server, destination, capsys):
    download(server.url, destination, SHA256)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "file.pth: 100%" in captured.err


def test_file_that_is_there_needs_no_network(server, destination):
    fetch(server, destination)
    server.requests.clear()
    assert fetch(server, destination) == destination
    assert download("http://127.0.0.1:1/file.pth", destination, SHA256) == destination
    assert server.requests == []


def test_no_declared_length(server, destination):
    server.declared_length = False
    fetch(server, destination)
    assert_whole(destination)


@pytest.mark.parametrize("close_after", [0, 1, HALF])
def test_interrupted_then_resumed(server, destination, close_after):
    server.close_after = close_after
    message = refusal(server, destination)
    assert f"the connection closed after {close_after} of {len(BODY)} bytes" in message
    assert message.endswith(f"fetched by hand and saved as {destination}")
    assert part_of(destination).read_bytes() == BODY[:close_after]

    server.close_after = None
    fetch(server, destination)
    assert_whole(destination)
    asked = f"bytes={close_after}-" if close_after else None
    assert server.requests[1:] == [(asked, len(BODY) - close_after)]


def test_interrupted_twice_then_resumed(server, destination):
    server.close_after = 1000
    refusal(server, destination)
    assert f"closed after 2000 of {len(BODY)} bytes" in refusal(server, destination)
    server.close_after = None
    fetch(server, destination)
    assert_whole(destination)
    assert [asked for asked, _ in server.requests] == [None, "bytes=1000-", "bytes=2000-"]


def test_control_c_then_resumed(server, destination, monkeypatch):
    class Interrupted(module.tqdm):
        def update(self, n=1):
            if self.n >= HALF:
                raise KeyboardInterrupt
            return super().update(n)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_CHUNK", 1 << 10)
        patch.setattr(module, "tqdm", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            download(server.url, destination, SHA256)
    kept = part_of(destination).stat().st_size
    assert HALF <= kept < len(BODY)

    fetch(server, destination)
    assert_whole(destination)
    assert server.requests[1:] == [(f"bytes={kept}-", len(BODY) - kept)]


def test_truncated_body_of_consistent_length(server, destination):
    server.body = BODY[:HALF]
    found = hashlib.sha256(BODY[:HALF]).hexdigest()[:8]
    message = refusal(server, destination)
    assert f"begins with {found}, expected {SHA256}: the data were thrown away" in message
    assert not part_of(destination).exists()


def test_wrong_hash_is_thrown_away_and_can_be_repeated(server, destination):
    server.body = BODY[:-1] + b"\0"
    found = hashlib.sha256(server.body).hexdigest()[:8]
    message = refusal(server, destination)
    assert f"begins with {found}, expected {SHA256}: the data were thrown away" in message
    assert not part_of(destination).exists()

    server.body = BODY
    fetch(server, destination)
    assert_whole(destination)


def test_server_without_ranges_starts_over(server, destination):
    server.close_after = HALF
    refusal(server, destination)
    server.close_after, server.ranges = None, False
    fetch(server, destination)
    assert_whole(destination)
    assert server.requests[1:] == [(f"bytes={HALF}-", len(BODY))]


def test_complete_part_needs_no_network(server, destination):
    destination.parent.mkdir(parents=True)
    part_of(destination).write_bytes(BODY)
    fetch(server, destination)
    assert_whole(destination)
    assert server.requests == []


def test_part_that_is_too_long_starts_over(server, destination):
    destination.parent.mkdir(parents=True)
    part_of(destination).write_bytes(BODY + b"x")
    fetch(server, destination)
    assert_whole(destination)
    assert server.requests == [(f"bytes={len(BODY) + 1}-", 2), (None, len(BODY))]


def test_part_of_another_file_is_thrown_away(server, destination):
    destination.parent.mkdir(parents=True)
    part_of(destination).write_bytes(b"x" * HALF)
    assert "the data were thrown away" in refusal(server, destination)
    fetch(server, destination)
    assert_whole(destination)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "HTTP Error 404: Not Found"), (503, "HTTP Error 503: Service Unavailable")],
)
def test_error_status_keeps_the_part(server, destination, status, reason):
    server.close_after = HALF
    refusal(server, destination)
    server.status = status
    message = refusal(server, destination)
    assert message == (
        f"cannot be downloaded: {reason}. The next try goes on from what has arrived; "
        f"the file can also be fetched by hand and saved as {destination}"
    )
    assert part_of(destination).read_bytes() == BODY[:HALF]


def test_no_server(destination, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.pth"
        with pytest.raises(InputError) as error:
            download(url, destination, SHA256)
    assert str(error.value).startswith(f"{url}: cannot be downloaded: [Errno 111] Connection ref")
    assert str(error.value).endswith(f"fetched by hand and saved as {destination}")


def test_another_range_than_the_one_asked_for_starts_over(server, destination):
    server.close_after = HALF
    refusal(server, destination)
    server.close_after, server.range_shift = None, 1
    fetch(server, destination)
    assert_whole(destination)
    assert [asked for asked, _ in server.requests] == [None, f"bytes={HALF}-", None]


def test_silent_server_times_out(server, destination, monkeypatch):
    monkeypatch.setattr(connection, "_TIMEOUT", 0.1)
    server.gate.clear()
    message = refusal(server, destination)
    server.gate.set()
    assert message.startswith("cannot be downloaded: timed out.")


def test_unwritable_folder(server, tmp_path):
    (tmp_path / "hub").write_text("a file in the way")
    with pytest.raises(InputError, match=r"cannot be downloaded: \[Errno 17\] File exists"):
        fetch(server, tmp_path / "hub" / "file.pth")
    assert server.requests == []


def test_two_downloads_at_once_fetch_once(server, destination):
    server.gate.clear()
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(server, destination)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    server.gate.set()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [destination] * 3
    assert_whole(destination)
    assert server.requests == [(None, len(BODY))]


def test_downloaded_checkpoint_is_verified_at_every_opening(server, tmp_path):
    server.body = save(weights(), tmp_path / "x.pth").read_bytes()
    sha256 = hashlib.sha256(server.body).hexdigest()[:8]
    destination = tmp_path / f"emanet-{sha256}.pth"
    download(server.url, destination, sha256, progress=False)
    read_checkpoint(destination, sha256)

    data = bytearray(server.body)
    data[len(data) // 2] ^= 1
    destination.write_bytes(data)
    assert download(server.url, destination, sha256) == destination
    with pytest.raises(InputError, match=f"expected {sha256}: the file is damaged or another one"):
        read_checkpoint(destination, sha256)


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
    monkeypatch.setattr(cache_folder.tempfile, "tempdir", str(tmp_path))
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


def test_a_file_is_checked_by_its_md5(server, destination):
    digits = hashlib.md5(BODY).hexdigest()
    with serving() as text:
        text.body = f"{digits}  file.pth\n".encode()
        download(server.url, destination, progress=False, md5_url=text.url)
    assert_whole(destination)


def test_a_wrong_md5_is_refused(server, destination):
    with serving() as text:
        text.body = b"0" * 32
        with pytest.raises(InputError, match="the MD5 of the received data begins with") as error:
            download(server.url, destination, progress=False, md5_url=text.url)
    assert f"{hashlib.md5(BODY).hexdigest()}, expected {'0' * 32}" in str(error.value)
    assert not destination.exists() and not part_of(destination).exists()


@pytest.mark.parametrize("body", [b"<html>", b"", b"0" * 40])
def test_without_an_md5_a_warning_says_so(server, destination, body):
    with serving() as text, pytest.warns(UserWarning, match="the downloaded file is not checked"):
        text.body = body
        download(server.url, destination, progress=False, md5_url=text.url)
    assert_whole(destination)


def test_without_any_hash_an_interrupted_download_begins_again(server, destination):
    server.close_after = HALF
    with pytest.raises(InputError, match=r"the connection closed.*\. The file can also be fetched"):
        download(server.url, destination, progress=False)
    server.close_after = None
    download(server.url, destination, progress=False)
    assert_whole(destination)
    assert server.requests == [(None, HALF), (None, len(BODY))]
