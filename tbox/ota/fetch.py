"""HTTP(S) for updates: small files with a limit, big files resumed across restarts. Believes no server.

Every byte count, rate, wait and retry has a limit; a deadline ends a connection that drips. What a download
has reached is written down only after it was synced, and is hashed again before it is built upon. Whether
and when to download is not decided here: `hold` is asked between blocks.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import msgspec
from msgspec import Meta

from tbox.errors import Refused, TboxError

BLOCK_BYTES = 64 * 1024
REDIRECTS = (301, 302, 303, 307, 308)
REDIRECTS_MAX = 3
ETAG_CHARS_MAX = 256
USER_AGENT = "tbox"

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class FetchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How patient a download is. rate_bytes_s 0: as fast as the bearer gives."""

    connect_s: Seconds = 15.0
    stall_s: Seconds = 30.0  # nothing at all for so long ends a connection
    small_s: Seconds = 60.0  # a small file as a whole
    slow_window_s: Seconds = 60.0  # over so long a big file must bring
    slow_bytes_s_min: Annotated[int, Meta(ge=0, le=1 << 20)] = 256  # at least this rate, or the server drips
    rate_bytes_s: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    retries_max: Annotated[int, Meta(ge=0, le=20)] = 5  # in a row without a new byte
    retry_s: Seconds = 2.0  # doubles with each, up to
    retry_s_max: Seconds = 60.0
    checkpoint_bytes: Annotated[int, Meta(ge=BLOCK_BYTES, le=1 << 30)] = 4 << 20


class FetchError(TboxError):
    """The server or the way to it failed; trying again later may do."""

    exit_code = 1


class ServerRefused(Refused):
    """What the server did may not be: another host, another length, another encoding."""


class Interrupted(Exception):
    """The download was stopped by `hold`; what is there is kept. `reason` is what it said."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class Clock(NamedTuple):
    """Monotonic seconds and a way to wait, so that tests need not."""

    monotonic_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


# --- one connection with a deadline --------------------------------------------------------------------


class _Timed(io.RawIOBase):
    """Reads a socket until a deadline, however slowly its bytes come."""

    def __init__(self, sock: socket.socket, deadline_s: float, stall_s: float, clock: Clock) -> None:
        self._sock, self._deadline_s, self._stall_s, self._clock = sock, deadline_s, stall_s, clock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until this is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        left = self._deadline_s - self._clock.monotonic_s()
        if left <= 0:
            raise TimeoutError("the server takes too long")
        self._sock.settimeout(min(left, self._stall_s))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """What http.client.HTTPResponse asks of a socket."""

    def __init__(self, *timed: Any) -> None:
        self._timed = timed

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Timed(*self._timed), BLOCK_BYTES)


def _response(
    sock: socket.socket, *args: object, deadline_s: float, stall_s: float, clock: Clock, **options: object
) -> http.client.HTTPResponse:
    timed = _TimedSocket(sock, deadline_s, stall_s, clock)
    return http.client.HTTPResponse(timed, *args, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Address:
    """Where a URL leads, checked. origin: what a redirect may not leave."""

    url: str
    parts: SplitResult

    @property
    def origin(self) -> tuple[str, str | None, int | None]:
        port = self.parts.port or (443 if self.parts.scheme == "https" else 80)
        return self.parts.scheme, self.parts.hostname, port

    @property
    def request_path(self) -> str:
        return (self.parts.path or "/") + (f"?{self.parts.query}" if self.parts.query else "")


def address(url: str) -> Address:
    """Return a URL's parts. Raises TboxError unless it is plain http or https without credentials."""
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None
        parts.port  # noqa: B018 (raises on nonsense)
        url.encode("ascii")
    except (ValueError, UnicodeEncodeError):
        bad = True
    if bad:
        raise TboxError("not an http or https URL", where=url[:200], mend="say https://host/path")
    return Address(url, parts)


class Http:
    """Opens one connection a request; TLS is checked against the system's roots or the given context."""

    def __init__(
        self,
        settings: FetchSettings | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings or FetchSettings()
        self.clock = clock or Clock()
        self._tls = tls

    @contextlib.contextmanager
    def open(
        self, url: str, headers: dict[str, str], deadline_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a GET, redirects on the same host followed.

        deadline_s: monotonic, for all of it. Raises FetchError, ServerRefused.
        """
        at = address(url)
        for _ in range(REDIRECTS_MAX + 1):
            connection = self._connection(at, deadline_s)
            response = None
            try:
                response = self._get(connection, at, headers)
                if response.status not in REDIRECTS:
                    self._check_encoding(response, at)
                    yield response
                    return
                at = self._redirected(at, response.getheader("Location") or "")
            finally:
                if response is not None:
                    response.close()
                connection.close()
        raise ServerRefused(f"more than {REDIRECTS_MAX} redirects", where=url)

    def _connection(self, at: Address, deadline_s: float) -> http.client.HTTPConnection:
        host, port = str(at.parts.hostname), at.origin[2]
        if at.parts.scheme == "https":
            tls = self._tls or ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self.settings.connect_s, context=tls
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self.settings.connect_s)
        connection.response_class = functools.partial(  # type: ignore[assignment]
            _response, deadline_s=deadline_s, stall_s=self.settings.stall_s, clock=self.clock
        )
        return connection

    @staticmethod
    def _get(
        connection: http.client.HTTPConnection, at: Address, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        plain = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Connection": "close"}
        try:
            connection.request("GET", at.request_path, headers=plain | headers)
            return connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failed(error, at.url) from None

    @staticmethod
    def _check_encoding(response: http.client.HTTPResponse, at: Address) -> None:
        encoding = (response.getheader("Content-Encoding") or "identity").strip().lower()
        if encoding != "identity":
            raise ServerRefused(
                f"sent with content encoding {encoding[:40]}", where=at.url, mend="serve files as they are"
            )

    @staticmethod
    def _redirected(at: Address, target: str) -> Address:
        try:
            there = address(urljoin(at.url, target))
        except (TboxError, ValueError):
            raise ServerRefused("redirects to something else than http", where=at.url) from None
        if there.origin != at.origin:
            raise ServerRefused("redirects to another host", where=at.url)
        return there

    def small(self, url: str, length_max: int) -> bytes | None:
        """Return a small file whole, None when the server says it has none (403, 404).

        Raises FetchError, ServerRefused (longer than length_max, among others).
        """
        deadline_s = self.clock.monotonic_s() + self.settings.small_s
        with self.open(url, {}, deadline_s) as response:
            if response.status in (403, 404):
                return None
            if response.status != 200:
                raise FetchError(f"HTTP {response.status} {response.reason}"[:120], where=url)
            parts, length = [], 0
            while block := read_block(response, url):
                length += len(block)
                if length > length_max:
                    raise ServerRefused(f"more than {length_max} bytes", where=url)
                parts.append(block)
            _check_complete(response, length, url)
            return b"".join(parts)


def read_block(response: http.client.HTTPResponse, url: str) -> bytes:
    """Return the next bytes, b"" at the end. Raises FetchError."""
    try:
        return response.read1(BLOCK_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed(error, url) from None


def _failed(error: Exception, url: str) -> FetchError:
    return FetchError(f"{type(error).__name__}: {error}"[:200], where=url)


def _check_complete(response: http.client.HTTPResponse, length: int, url: str) -> None:
    declared = response.getheader("Content-Length")
    if declared is not None and declared.isdigit() and int(declared) != length:
        raise FetchError(f"ended after {length} of {declared} bytes", where=url)
