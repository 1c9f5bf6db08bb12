"""What servers and proxies answer, and the messages about it."""

import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request

import pytest
from download_server import SHA256, assert_whole, refusal

from emanet_triton.errors import InputError
from emanet_triton.models import connection
from emanet_triton.models.download import download


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


def test_the_words_of_a_server_are_escaped(destination, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    def answer(client: socket.socket) -> None:
        with client:
            client.sendall(b"HTTP/1.1 404 \x1b[2J\tgone\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: answer(server.accept()[0]))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file.pth"
        with pytest.raises(InputError) as error:
            download(url, destination, SHA256, progress=False)
    assert ": cannot be downloaded: HTTP Error 404: \\x1b[2J\\tgone. " in str(error.value)


def test_a_redirect_to_plain_http_is_refused():
    request = Request("https://example.org/x")
    with pytest.raises(ConnectionError, match=r"^it redirects from https to http$"):
        connection._Redirects().redirect_request(request, None, 302, "", {}, "http://example.org")


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


def test_a_password_in_an_address_is_not_repeated(destination, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError) as error:
        download("http://me:w0rd@example.invalid/x", destination, SHA256, progress=False)
    assert str(error.value).startswith(
        "http://example.invalid/x: cannot be downloaded: nonnumeric port: '***@example.invalid'."
    )
