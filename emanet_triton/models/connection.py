"""HTTP and HTTPS requests, through proxies. An answer that comes too slowly is an error."""

import io
import re
import ssl
import time
from http.client import HTTPConnection, HTTPMessage, HTTPResponse, HTTPSConnection
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    getproxies,
    proxy_bypass,
)

_TIMEOUT = 30.0  # seconds without a byte
_WINDOW, _LEAST = 60.0, 64 << 10  # seconds, and the bytes that must come in them


def open_url(url: str, headers: dict[str, str] | None = None) -> HTTPResponse:
    """The answer to a GET request, through the proxies of the environment.

    Raises:
        OSError: there is no connection, the status is 400 or more (``HTTPError``), the scheme is
            neither http nor https (also after a redirect), or https is redirected to http.
            Reading raises TimeoutError if nothing comes in 30 s or less than 64 KiB in 60 s.
        http.client.HTTPException, ValueError: the answer or the address is malformed.
    """
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        _Plain,
        _Secure,
        _Redirects,
        HTTPDefaultErrorHandler,
        HTTPErrorProcessor,
        UnknownHandler,
    ):
        opener.add_handler(handler())
    request = Request(url, headers={"User-Agent": "emanet-triton", **(headers or {})})
    return opener.open(request, timeout=_TIMEOUT)


def through_proxy(url: str) -> str:
    """For messages: " through the proxy HOST" if a proxy is set for the address, else "".

    HOST is without user name and password.
    """
    scheme, _, rest = url.partition("://")
    proxy = getproxies().get(scheme)
    if not proxy or proxy_bypass(rest.partition("/")[0]):
        return ""
    return f" through the proxy {proxy.rpartition('@')[2].rpartition('//')[2]}"


def without_secrets(text: str, *addresses: str) -> str:
    """The text without the user names and passwords of proxies and of the given addresses."""
    for address in (*getproxies().values(), *addresses):
        found = re.search(r"(?:^|//)([^/]*)@", address)
        for secret in (found[1], found[1].partition(":")[2]) if found else ():
            text = text.replace(secret, "***") if secret else text
    return re.sub(r"//[^/\s]*@", "//", text)


class _Paced(io.RawIOBase):
    """The bytes of a connection.

    Reading raises TimeoutError if fewer than ``_LEAST`` bytes come in ``_WINDOW`` seconds.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._since, self._bytes = time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._bytes += count
        now = time.monotonic()
        if now - self._since > _WINDOW:
            if self._bytes < _LEAST:
                raise TimeoutError(f"only {self._bytes} bytes came in {now - self._since:.0f} s")
            self._since, self._bytes = now, 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(HTTPResponse):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


class _PlainConnection(HTTPConnection):
    response_class = _Answer


class _SecureConnection(HTTPSConnection):
    response_class = _Answer


class _Plain(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_PlainConnection, req)


class _Secure(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, req, context=ssl.create_default_context())


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        schemes = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if schemes not in (("http", "http"), ("http", "https"), ("https", "https")):
            raise ConnectionError(f"it redirects from {schemes[0]} to {schemes[1] or 'nowhere'}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
