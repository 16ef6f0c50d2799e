"""HTTP(S) for updates: small files with a limit, big files resumed across restarts. Believes no server.

Every byte count, rate, wait and retry has a limit; a deadline ends a connection that drips. What a download
has reached is written down only after it was synced, and is hashed again before it is built upon. Whether
and when to download is not decided here: `hold` is asked between blocks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

import msgspec
from msgspec import Meta

from tbox.durable import RangedStorage, TwoCopies
from tbox.errors import Refused, TboxError

BLOCK_BYTES = 64 * 1024
REDIRECTS = (301, 302, 303, 307, 308)
REDIRECTS_MAX = 3
ETAG_CHARS_MAX = 256
WAIT_SLICE_S = 0.5
USER_AGENT = "tbox"
_CONTENT_RANGE = re.compile(r"^bytes (\d{1,18})-(\d{1,18})/(\d{1,18})$")

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class FetchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How patient a download is. rate_bytes_s 0: as fast as the bearer gives."""

    connect_s: Seconds = 15.0
    stall_s: Seconds = 30.0  # nothing at all for so long ends a connection
    small_s: Seconds = 60.0  # a small file as a whole
    slow_window_s: Seconds = 60.0  # over so long a big file must bring
    slow_bytes_s_min: Annotated[int, Meta(ge=0, le=1 << 20)] = 256  # at least this rate, or the server drips
    rate_bytes_s: Annotated[int, Meta(ge=0, le=1 << 30)] = 0
    retries_max: Annotated[int, Meta(ge=0, le=20)] = 5  # in a row that bring less than a block
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


@dataclass
class Deadline:
    """Monotonic seconds by which more must have come; who reads may move it."""

    at_s: float


class _Timed(io.RawIOBase):
    """Reads a socket until a deadline, however slowly its bytes come."""

    def __init__(self, sock: socket.socket, deadline: Deadline, stall_s: float, clock: Clock) -> None:
        self._sock, self._deadline, self._stall_s, self._clock = sock, deadline, stall_s, clock
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until this is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        left = self._deadline.at_s - self._clock.monotonic_s()
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
    sock: socket.socket, *args: object, deadline: Deadline, stall_s: float, clock: Clock, **options: object
) -> http.client.HTTPResponse:
    timed = _TimedSocket(sock, deadline, stall_s, clock)
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
        self, url: str, headers: dict[str, str], deadline: Deadline
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a GET, redirects on the same host followed.

        deadline: for all of it. Raises FetchError, ServerRefused.
        """
        at = address(url)
        for _ in range(REDIRECTS_MAX + 1):
            connection = self._connection(at, deadline)
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

    def _connection(self, at: Address, deadline: Deadline) -> http.client.HTTPConnection:
        host, port = str(at.parts.hostname), at.origin[2]
        if at.parts.scheme == "https":
            tls = self._tls or ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self.settings.connect_s, context=tls
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self.settings.connect_s)
        connection.response_class = functools.partial(  # type: ignore[assignment]
            _response, deadline=deadline, stall_s=self.settings.stall_s, clock=self.clock
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
        deadline = Deadline(self.clock.monotonic_s() + self.settings.small_s)
        with self.open(url, {}, deadline) as response:
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


def read_block(response: http.client.HTTPResponse, url: str, size: int = BLOCK_BYTES) -> bytes:
    """Return the next bytes, b"" at the end. Raises FetchError."""
    try:
        return response.read1(size)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed(error, url) from None


def _failed(error: Exception, url: str) -> FetchError:
    return FetchError(f"{type(error).__name__}: {error}"[:200], where=url)


def _check_complete(response: http.client.HTTPResponse, length: int, url: str) -> None:
    declared = response.getheader("Content-Length")
    if declared is not None and declared.isdigit() and int(declared) != length:
        raise FetchError(f"ended after {length} of {declared} bytes", where=url)


# --- big files, resumed --------------------------------------------------------------------------------


class Reached(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a download has come, on flash; written after the bytes it tells of were synced.

    sha256: of the first `offset` bytes, which are hashed again before anything is added to them.
    """

    wanted: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    offset: Annotated[int, Meta(ge=0)] = 0
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] = hashlib.sha256().hexdigest()
    etag: Annotated[str, Meta(max_length=ETAG_CHARS_MAX)] = ""


class Bucket:
    """A token bucket of one second's worth; rate 0 lets everything through."""

    def __init__(self, rate_bytes_s: int, now_s: float) -> None:
        self._rate, self._level, self._at_s = rate_bytes_s, float(rate_bytes_s), now_s

    def take(self, count: int, now_s: float) -> float:
        """Take so many bytes; return how many seconds to wait before the next are taken."""
        if not self._rate:
            return 0.0
        self._level = min(self._rate, self._level + (now_s - self._at_s) * self._rate) - count
        self._at_s = now_s
        return max(0.0, -self._level / self._rate)


class _Retry(Exception):
    """This attempt is over; another may do better."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s
        super().__init__(why)


Hold = Callable[[], str]  # why the download must stop now, "" to go on
Progress = Callable[[int, int], None]  # bytes here, bytes in all


class Downloads:
    """Brings one file at a time into a directory, which must exist. Used by one thread."""

    def __init__(self, http: Http, storage: RangedStorage, directory: str) -> None:
        self._http, self._storage, self._dir = http, storage, directory
        self._reached = TwoCopies(storage, directory, "reached")

    def path(self, sha256: str) -> str:
        return f"{self._dir}/{sha256}.download"

    def fetch(
        self,
        url: str,
        length: int,
        sha256: str,
        hold: Hold = lambda: "",
        progress: Progress = lambda here, all_: None,
    ) -> str:
        """Return the path of the file of this length and digest, downloaded as far as it is not here.

        Raises Interrupted when `hold` gives a reason, FetchError when retries are used up, ServerRefused when
        what the server has is not the file, OSError. What was fetched before stays, except on ServerRefused.
        """
        job = _Job(self._http, self._storage, self._reached, self.path(sha256), url, length, sha256)
        self._sweep(sha256)
        try:
            job.run(hold, progress)
        except ServerRefused:
            job.reset("")
            raise
        return self.path(sha256)

    def _sweep(self, keep: str) -> None:
        """Remove other downloads: the disk is sized for one."""
        for name in self._storage.listdir(self._dir):
            if name.endswith(".download") and name != f"{keep}.download":
                self._storage.unlink(f"{self._dir}/{name}")


class _Job:
    """One file on its way: what is here, its digest so far, and the attempts at the rest."""

    def __init__(
        self,
        http: Http,
        storage: RangedStorage,
        reached: TwoCopies,
        path: str,
        url: str,
        length: int,
        sha256: str,
    ) -> None:
        self._http, self._storage, self._copies = http, storage, reached
        self._path, self._url, self._length, self._wanted = path, url, length, sha256
        self._offset, self._hash, self._etag = 0, hashlib.sha256(), ""
        self._saved_offset = 0
        settings = http.settings
        self._settings, self._clock = settings, http.clock
        self._bucket = Bucket(settings.rate_bytes_s, self._clock.monotonic_s())
        self._block = BLOCK_BYTES
        if settings.rate_bytes_s:
            self._block = max(512, min(BLOCK_BYTES, settings.rate_bytes_s // 4))

    def run(self, hold: Hold, progress: Progress) -> None:
        self._hold, self._progress = hold, progress
        self._resume()
        progress(self._offset, self._length)
        failures = 0
        while self._offset < self._length:
            before = self._offset
            try:
                self._ask_hold()
                self._attempt()
            except (_Retry, FetchError) as error:
                failures = 0 if self._offset - before >= BLOCK_BYTES else failures + 1
                self._save()
                if failures > self._settings.retries_max:
                    raise FetchError(
                        f"given up after {failures} attempts that brought next to nothing: {error}",
                        where=self._url,
                    ) from None
                self._wait(self._pause_s(failures, error.wait_s if isinstance(error, _Retry) else 0.0))
        if self._hash.hexdigest() != self._wanted:
            raise ServerRefused("what came is not the signed file", where=self._url)
        if not self._length:
            self._storage.write(self._path, b"")  # no byte made this file, and who installs it opens it
        self._save()

    def _pause_s(self, failures: int, asked_s: float) -> float:
        pause_s: float = self._settings.retry_s * 2 ** max(0, failures - 1)
        return min(self._settings.retry_s_max, max(pause_s, asked_s))

    # --- what is here ----------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take up what is here, as far as it is what was written down."""
        newest = self._copies.read()
        try:
            reached = msgspec.msgpack.decode(newest[1], type=Reached) if newest else None
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
            reached = None
        if reached is None or reached.wanted != self._wanted or not self._rehash(reached):
            self.reset("")
            return
        self._offset = self._saved_offset = reached.offset
        self._etag = reached.etag

    def _rehash(self, reached: Reached) -> bool:
        """Hash the bytes that are said to be here; False unless they are, and are what they were."""
        if reached.offset > self._length or not self._storage.exists(self._path):
            return False
        sha256, at = hashlib.sha256(), 0
        while at < reached.offset:
            block = self._storage.read_at(self._path, at, min(BLOCK_BYTES, reached.offset - at))
            if not block:
                return False
            sha256.update(block)
            at += len(block)
        if sha256.hexdigest() != reached.sha256:
            return False
        self._storage.truncate(self._path, reached.offset)
        self._hash = sha256
        return True

    def reset(self, etag: str) -> None:
        """Begin anew."""
        if self._storage.exists(self._path):
            self._storage.truncate(self._path, 0)
        self._offset = self._saved_offset = 0
        self._hash, self._etag = hashlib.sha256(), etag

    def _save(self) -> None:
        """Make what came durable, then say so."""
        if self._offset == self._saved_offset:
            return
        self._storage.fsync(self._path)
        self._storage.fsync_dir(self._path.rpartition("/")[0])
        reached = Reached(
            wanted=self._wanted, offset=self._offset, sha256=self._hash.hexdigest(), etag=self._etag
        )
        self._copies.write(msgspec.msgpack.encode(reached))
        self._saved_offset = self._offset

    # --- an attempt ------------------------------------------------------------------------------

    def _attempt(self) -> None:
        headers = {}
        if self._offset:
            headers["Range"] = f"bytes={self._offset}-"
            if self._etag:
                headers["If-Range"] = self._etag
        deadline = Deadline(self._clock.monotonic_s() + self._settings.small_s)
        with self._http.open(self._url, headers, deadline) as response:
            self._accept(response)
            self._body(response, deadline)

    def _accept(self, response: http.client.HTTPResponse) -> None:
        """Check the status and headers against what was asked for and what is signed."""
        etag = response.getheader("ETag") or ""
        strong = etag if etag.startswith('"') and len(etag) <= ETAG_CHARS_MAX else ""
        if response.status == 206 and self._offset:
            self._check_range(response, strong)
        elif response.status == 200:
            declared = response.getheader("Content-Length")
            if declared is not None and declared != str(self._length):
                raise ServerRefused(f"is {declared[:20]} bytes, {self._length} are signed", where=self._url)
            self.reset(strong)
        elif response.status == 416:
            self.reset("")
            raise _Retry("the server cannot go on from there")
        elif response.status in (408, 429) or response.status >= 500:
            asked = response.getheader("Retry-After") or ""
            raise _Retry(f"HTTP {response.status}", float(asked) if asked.isdigit() else 0.0)
        else:
            raise ServerRefused(f"HTTP {response.status} {response.reason}"[:120], where=self._url)

    def _check_range(self, response: http.client.HTTPResponse, etag: str) -> None:
        match = _CONTENT_RANGE.match(response.getheader("Content-Range") or "")
        if match is None or int(match[1]) != self._offset or int(match[3]) != self._length:
            raise ServerRefused("sent another range than asked for", where=self._url)
        if not self._offset <= int(match[2]) < self._length:
            raise ServerRefused("sent a range that contradicts itself", where=self._url)
        if self._etag and etag != self._etag:
            self.reset("")
            raise _Retry("the file changed at the server")

    def _body(self, response: http.client.HTTPResponse, deadline: Deadline) -> None:
        """Take bytes until they end; each window of time must bring enough of them."""
        window_bytes, since_save = 0, 0
        enough = self._settings.slow_bytes_s_min * self._settings.slow_window_s
        deadline.at_s = self._clock.monotonic_s() + self._settings.slow_window_s
        while block := read_block(response, self._url, self._block):
            if self._offset + len(block) > self._length:
                raise ServerRefused(f"sends more than the {self._length} signed bytes", where=self._url)
            self._storage.write(self._path, block, self._offset)
            self._hash.update(block)
            self._offset += len(block)
            self._progress(self._offset, self._length)
            window_bytes, since_save = window_bytes + len(block), since_save + len(block)
            if since_save >= self._settings.checkpoint_bytes:
                since_save = 0
                self._save()
            if self._offset == self._length:
                return
            self._ask_hold()
            waited_s = self._bucket.take(len(block), self._clock.monotonic_s())
            self._wait(waited_s)
            deadline.at_s += waited_s
            if window_bytes >= enough:
                window_bytes = 0
                deadline.at_s = self._clock.monotonic_s() + self._settings.slow_window_s
        raise _Retry(f"ended after {self._offset} of {self._length} bytes")

    def _ask_hold(self) -> None:
        reason = self._hold()
        if reason:
            self._save()
            raise Interrupted(reason)

    def _wait(self, seconds: float) -> None:
        """Wait, in slices short enough to be stopped."""
        end_s = self._clock.monotonic_s() + seconds
        while (left_s := end_s - self._clock.monotonic_s()) > 0:
            self._clock.sleep(min(left_s, WAIT_SLICE_S))
            self._ask_hold()
