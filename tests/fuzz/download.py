"""Downloads from a server with faults: the whole file arrives, or no file is kept."""

import contextlib
import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from emanet_triton.errors import InputError, one_line
from emanet_triton.models import connection
from emanet_triton.models import download as module
from emanet_triton.models.download import download

Answer = Callable[[socket.socket, int], None]  # to a request from a byte on


def attempt(seed: int, folder: Path) -> str:
    """Fetch file number ``seed`` from a server with a fault, then from one without."""
    rng = random.Random(seed)
    body = rng.randbytes(rng.choice((1, 1000, 30_000)))
    sha256, destination = hashlib.sha256(body).hexdigest()[:8], folder / "file.pth"
    _earlier(rng, body, folder / "file.pth.part")
    with (
        mock.patch.dict(os.environ, no_proxy="*"),
        mock.patch.object(connection, "_TIMEOUT", 0.3),
        mock.patch.object(connection, "_WINDOW", 0.3),
        mock.patch.object(module, "_MOST_BYTES", 100_000),
    ):
        result = "right"
        with _serving(rng.choice(FAULTS)(rng, body)) as url:
            try:
                download(url, destination, sha256, progress=False)
            except InputError as error:
                result = "refused"
                assert one_line(str(error)) == str(error)
                assert not destination.exists()
        with _serving(_whole(rng, body)) as url:
            try:
                download(url, destination, sha256, progress=False)
            except InputError as error:  # of a part of another file
                assert "the data were thrown away" in str(error)
                assert one_line(str(error)) == str(error)
                download(url, destination, sha256, progress=False)
    assert destination.read_bytes() == body
    assert [path.name for path in folder.iterdir()] == ["file.pth"]
    return result


def _earlier(rng: random.Random, body: bytes, part: Path) -> None:
    """Files that an earlier download may have left."""
    kinds = (None, None, body[: len(body) // 2], body, body + b"x", rng.randbytes(len(body) // 2))
    content = rng.choice(kinds)
    if content is not None:
        part.write_bytes(content)


@contextlib.contextmanager
def _serving(answer: Answer) -> Iterator[str]:
    """The address of a server that answers each connection by ``answer``."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with contextlib.suppress(OSError):
                    client, _ = server.accept()
                    with client:
                        client.settimeout(5)
                        answer(client, _start(client))
                        client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/file.pth"
        finally:
            done.set()
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=10)
    assert not thread.is_alive()


def _start(client: socket.socket) -> int:
    """Read a request; return the first byte that it asks for."""
    request = b""
    while b"\r\n\r\n" not in request:
        if not (more := client.recv(4096)):
            break
        request += more
    _, _, asked = request.partition(b"Range: bytes=")
    return int(asked.split(b"-")[0]) if asked else 0


def _head(status: str, **headers: object) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode()


def _whole(rng: random.Random, body: bytes) -> Answer:
    """Answer without a fault."""

    def answer(client: socket.socket, start: int) -> None:
        size = len(body)
        if start >= size:
            client.sendall(_head("416 Range Not Satisfiable", Content_Length=0))
        elif start:
            span = f"bytes {start}-{size - 1}/{size}"
            head = _head("206 Partial Content", Content_Length=size - start, Content_Range=span)
            client.sendall(head + body[start:])
        else:
            client.sendall(_head("200 OK", Content_Length=size) + body)

    return answer


def _sends(*parts: bytes, pause: float = 0.0) -> Answer:
    def answer(client: socket.socket, start: int) -> None:
        for part in parts:
            client.sendall(part)
            time.sleep(pause)

    return answer


def _cut(rng: random.Random, body: bytes) -> Answer:
    head = _head("200 OK", Content_Length=len(body))
    return _sends((head + body)[: rng.randrange(len(head) + len(body))])


def _wrong_length(rng: random.Random, body: bytes) -> Answer:
    length = rng.choice((len(body) - 1, len(body) + 9, -1, 0, "many", 10**30, f"{len(body)}, 1"))
    return _sends(_head("200 OK", Content_Length=length) + body)


def _no_length(rng: random.Random, body: bytes) -> Answer:
    return _sends(_head("200 OK") + body[: rng.choice((len(body), len(body) // 2))])


def _wrong_range(rng: random.Random, body: bytes) -> Answer:
    spans = ("bytes 7-9/10", "bytes 0-0/1", "items 1-2/3", "", "bytes */9", "bytes 9-1/-4")
    headers = {"Content_Length": len(body), "Content_Range": rng.choice(spans)}
    return _sends(_head("206 Partial Content", **headers) + body)


def _ignores_ranges(rng: random.Random, body: bytes) -> Answer:
    return _sends(_head("200 OK", Content_Length=len(body)) + body)


def _garbage(rng: random.Random, body: bytes) -> Answer:
    return _sends(rng.choice((b"", b"HTTP", b"HTTP/1.1 2x0 OK\r\n")) + rng.randbytes(500))


def _damaged(rng: random.Random, body: bytes) -> Answer:
    at = rng.randrange(len(body))
    changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    return _sends(_head("200 OK", Content_Length=len(body)) + changed)


def _slow(rng: random.Random, body: bytes) -> Answer:
    content = _head("200 OK", Content_Length=len(body) + 1000) + body[:100]
    at = rng.randrange(len(content))
    rest = [content[i : i + 1] for i in range(at, at + 20)]
    return _sends(content[:at], *rest, pause=0.05)


def _silent(rng: random.Random, body: bytes) -> Answer:
    return _sends(_head("200 OK", Content_Length=len(body)), b"", pause=0.3)


def _redirects(rng: random.Random, body: bytes) -> Answer:
    places = ("/file.pth", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "//", "\x1b[31m")
    return _sends(_head(rng.choice(("301 x", "302 x", "307 x")), Location=rng.choice(places)))


def _huge_headers(rng: random.Random, body: bytes) -> Answer:
    more = rng.choice(
        ({f"X_{i}": 1 for i in range(200)}, {"X": "y" * 70_000}, {"Z": "\r\n " * 5000})
    )
    return _sends(_head("200 OK", Content_Length=len(body), **more) + body)


def _compressed(rng: random.Random, body: bytes) -> Answer:
    return _sends(_head("200 OK", Content_Length=len(body), Content_Encoding="gzip") + body)


def _chunked(rng: random.Random, body: bytes) -> Answer:
    size = rng.choice((f"{len(body):x}", f"{len(body) + 5:x}", "-1", "zz", "f" * 40))
    head = _head("200 OK", Transfer_Encoding="chunked")
    return _sends(head + size.encode() + b"\r\n" + body + rng.choice((b"", b"\r\n0\r\n\r\n")))


def _endless(rng: random.Random, body: bytes) -> Answer:
    return _sends(_head("200 OK"), *[b"x" * 60_000] * 3)


def _status(rng: random.Random, body: bytes) -> Answer:
    code = rng.choice((100, 204, 205, 299, 400, 401, 404, 407, 416, 429, 500, 503, 999))
    return _sends(_head(f"{code} \x1b[2J", Content_Length=2) + b"no")


FAULTS = (
    _whole,
    _cut,
    _wrong_length,
    _no_length,
    _wrong_range,
    _ignores_ranges,
    _garbage,
    _damaged,
    _slow,
    _silent,
    _redirects,
    _huge_headers,
    _compressed,
    _chunked,
    _endless,
    _status,
)
