"""JSON over HTTP to a judge: this machine unless others are allowed, no redirects, no proxies, limits of time and size, retries."""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

from ..reward import RewardUnavailable

MOST_BYTES = 1 << 20  # of an answer
_AGAIN = frozenset({429, 500, 502, 503, 504})
_LOOPBACK = ("127.0.0.1", "::1")
_SHOWN = 200  # characters of what a judge says of its errors
_TICK = 0.05  # s between two calls of `waiting`


class _TryAgain(Exception):
    """No answer, or one of a server in trouble."""


def is_url(name: str) -> bool:
    """Whether the name of a reward is a judge's URL."""
    return name.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is asked; `local`: on this machine alone."""

    url: str
    secure: bool
    host: str
    port: int
    path: str
    local: bool

    @staticmethod
    def parse(url: str, allow_remote: bool) -> Endpoint:
        """RewardUnavailable where the URL is not plain, or not of this machine and other machines are not allowed."""

        def refuse(why: str) -> NoReturn:
            raise RewardUnavailable(f"{url[:200]!r}: {why}; the form is http://127.0.0.1:PORT or http://127.0.0.1:PORT/NAME")

        if not re.fullmatch(r"[!-~]+", url):  # urlsplit drops tabs and line ends
            refuse("a judge's URL has neither spaces nor letters beyond ASCII")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            refuse(str(error))
        if parts.scheme not in ("http", "https") or not host or port == 0:
            refuse("not the URL of a judge")
        if "@" in parts.netloc or "\\" in url or "%" in parts.netloc:
            refuse("a judge's URL holds a host and a port, and no user")
        if "?" in url or "#" in url or not re.fullmatch(r"(/[\w.~-]+)*/?", parts.path) or ".." in parts.path:
            refuse("a judge's URL ends with a plain path, without ? or #")
        address = _address(host)
        if address is not None and address.is_unspecified:
            refuse(f"{host} is where a server listens, not what to ask")
        local = host == "localhost" or (address is not None and address.is_loopback)
        if not local and not allow_remote:
            raise RewardUnavailable(
                f"{url}: {host} is not this machine, and images would leave it: forward its port to 127.0.0.1, or allow it "
                "(--allow-remote; allow_remote = true in a config)"
            )
        secure = parts.scheme == "https"
        return Endpoint(url.rstrip("/"), secure, host, port or (443 if secure else 80), parts.path.rstrip("/"), local)

    def ask(
        self,
        path: str,
        content: dict[str, Any] | None,
        seconds: float,
        retries: int,
        pause: float,
        waiting: Callable[[], None],
    ) -> Any:
        """The JSON that a GET, or with `content` a POST, is answered by; `retries` times again, after `pause` s, then 2·, 4·, ….

        Each try ends after `seconds`. `waiting` is called all the while, and may raise. RewardUnavailable where none comes.
        """
        body, why = None if content is None else json.dumps(content, separators=(",", ":")).encode(), ""
        for attempt in range(retries + 1):
            try:
                return self._once(path, body, seconds, waiting)
            except _TryAgain as error:
                why = str(error)
            end = time.monotonic() + pause * 2**attempt
            while attempt < retries and (left := end - time.monotonic()) > 0:
                waiting()
                time.sleep(min(_TICK, left))
        tries = f"{retries + 1} times" if retries else "once"
        raise RewardUnavailable(f"judge {self.url} was asked {tries} and gave no answer: {why}; start it, or give it more time")

    def _once(self, path: str, body: bytes | None, seconds: float, waiting: Callable[[], None]) -> Any:
        """One try, in a thread of its own: a server that sends a byte now and then must not outlive the limit."""
        exchange = _Exchange(self, path, body, seconds)
        thread = threading.Thread(target=exchange.run, daemon=True)
        end = time.monotonic() + seconds
        thread.start()
        try:
            while thread.is_alive():
                waiting()
                left = end - time.monotonic()
                if left <= 0:
                    raise _TryAgain(f"no answer within {seconds:g} s")
                thread.join(min(_TICK, left))
        finally:
            exchange.close()
        if exchange.error is not None:
            raise _TryAgain(_said(exchange.error)) from exchange.error
        return self._read(exchange)

    def _read(self, exchange: _Exchange) -> Any:
        """The JSON of a whole answer."""
        status, kind, data = exchange.status, exchange.kind, exchange.data
        if exchange.too_long:
            raise RewardUnavailable(f"judge {self.url} answered with more than {MOST_BYTES >> 20} MB")
        if status != 200:
            said = f"HTTP {status}{_error_in(data, kind)}"
            if status in _AGAIN:
                raise _TryAgain(said)
            place = ": redirects are not followed" if 300 <= status < 400 else ""
            raise RewardUnavailable(f"judge {self.url}{exchange.path} answered {said}{place}")
        try:
            return json.loads(data.decode("utf-8"), parse_constant=_not_json)
        except (ValueError, RecursionError) as error:
            raise RewardUnavailable(
                f"judge {self.url}{exchange.path} answered {kind or 'something'} that is not JSON: {_said(error)}"
            ) from error


class _Exchange:
    """A request and its answer."""

    def __init__(self, endpoint: Endpoint, path: str, body: bytes | None, seconds: float) -> None:
        self.endpoint, self.path, self.body, self.seconds = endpoint, path, body, seconds
        self.status, self.kind, self.data, self.too_long = 0, "", b"", False
        self.error: Exception | None = None
        self._socket: socket.socket | None = None
        self._closed = False

    def run(self) -> None:
        """Ask, and read the whole answer."""
        try:
            connection = self._connected()
            headers = {"Accept": "application/json", "Connection": "close", "Host": _host(self.endpoint)}
            if self.body is not None:
                headers["Content-Type"] = "application/json"
            connection.request("GET" if self.body is None else "POST", self.endpoint.path + self.path, self.body, headers)
            response = connection.getresponse()
            self.status, self.kind = response.status, (response.getheader("Content-Type") or "").partition(";")[0].strip()
            self.data = response.read(MOST_BYTES + 1)
            self.too_long = len(self.data) > MOST_BYTES
            if not self.too_long and response.length:
                raise http.client.IncompleteRead(self.data, response.length)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:  # the last two: the other thread closed it
            self.error = error

    def _connected(self) -> http.client.HTTPConnection:
        """A connection; to this machine where no other is allowed, whatever its names resolve to."""
        e, errors = self.endpoint, list[OSError]()
        plain = _LOOPBACK if e.host == "localhost" else (e.host,)
        for host in (e.host,) if e.secure else plain:  # a certificate is of a name
            for family, kind, protocol, _, address in socket.getaddrinfo(host, e.port, type=socket.SOCK_STREAM):
                try:
                    sock = self._opened(socket.socket(family, kind, protocol), address)
                except OSError as error:
                    errors.append(error)
                    self._shut()
                    continue
                connection = http.client.HTTPConnection(e.host, e.port)
                connection.sock = sock
                return connection
        raise errors[0]

    def _opened(self, plain: socket.socket, address: Any) -> socket.socket:
        """The socket, connected; `close` ends it at any moment of that."""
        self._socket = plain
        if self._closed:
            raise OSError("closed")
        plain.settimeout(self.seconds)
        plain.connect(address)
        if self.endpoint.local and not ipaddress.ip_address(plain.getpeername()[0]).is_loopback:
            raise OSError(f"{self.endpoint.host} leads to another machine")
        if self.endpoint.secure:
            context = ssl.create_default_context()
            self._socket = secured = context.wrap_socket(plain, server_hostname=self.endpoint.host, do_handshake_on_connect=False)
            secured.do_handshake()
        return self._socket

    def close(self) -> None:
        """End it, whatever the other side does."""
        self._closed = True
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()


def _host(endpoint: Endpoint) -> str:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    return f"{host}:{endpoint.port}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _error_in(data: bytes, kind: str) -> str:
    """What a judge's answer says of its error: its text `error`, or the kind of page it is."""
    try:
        said: Any = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        said = None
    text: Any = cast(dict[str, Any], said).get("error") if isinstance(said, dict) else None
    return f" ({one_line(text)})" if isinstance(text, str) and text.strip() else f" ({kind})" if kind else ""


def one_line(text: str) -> str:
    """A judge's text as part of a message: printable, on one line, and short."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def _said(error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut off"
    if isinstance(error, OSError) and error.strerror:
        return one_line(error.strerror)
    return one_line(str(error) or type(error).__name__)
