"""A local server that breaks in every way a network does, for tests of downloads."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from emanet_triton.errors import InputError
from emanet_triton.models.download import download

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()[:8]
HALF = len(BODY) // 2


class Server:
    """Serves one body. The attributes are set by the tests.

    ``requests`` collects (Range header or None, bytes sent) in the order of the answers.
    """

    def __init__(self) -> None:
        self.body = BODY
        self.status = 200
        self.ranges = True
        self.close_after: int | None = None  # body bytes before the connection is closed
        self.declared_length = True
        self.headers: dict[str, str] = {}  # further ones
        self.range_shift = 0  # of the first byte that a Content-Range names
        self.pause = 0.0  # seconds after each byte of the body
        self.paths: list[str] = []
        self.requests: list[tuple[str | None, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            do_CONNECT = do_GET  # noqa: N815 (as http.server calls it)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.pth"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.gate.wait(timeout=20)
        self.paths.append(handler.path)
        asked = handler.headers["Range"]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        status = self.status
        if not self.ranges:
            start = 0
        elif asked and status == 200:
            status = 206 if start < len(self.body) else 416
        body = self.body[start:] if status < 300 else b"no"
        handler.send_response(status)
        if status == 206 and asked:
            first, end = start + self.range_shift, len(self.body) - 1
            handler.send_header("Content-Range", f"bytes {first}-{end}/{len(self.body)}")
        for name, value in self.headers.items():
            handler.send_header(name, value)
        if self.declared_length:
            handler.send_header("Content-Length", str(len(body)))
        body = body[: self.close_after]
        self.requests.append((asked, len(body)))  # before the client hears of it
        handler.end_headers()
        with suppress(ConnectionError):  # the client may have gone
            if not self.pause:
                handler.wfile.write(body)
                return
            for byte in body:
                handler.wfile.write(bytes([byte]))
                time.sleep(self.pause)


@contextmanager
def serving() -> Iterator[Server]:
    """A server at work."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def part_of(destination: Path) -> Path:
    return destination.with_name("file.pth.part")


def fetch(server: Server, destination: Path) -> Path:
    return download(server.url, destination, SHA256, progress=False)


def refusal(server: Server, destination: Path) -> str:
    """The message of a download that fails, without the address."""
    with pytest.raises(InputError) as error:
        fetch(server, destination)
    assert not destination.exists()
    assert str(error.value).startswith(f"{server.url}: ")
    return str(error.value).removeprefix(f"{server.url}: ")


def assert_whole(destination: Path) -> None:
    assert destination.read_bytes() == BODY
    assert [path.name for path in destination.parent.iterdir()] == ["file.pth"]
