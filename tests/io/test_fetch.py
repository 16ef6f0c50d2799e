"""Downloads against a server that misbehaves in every way one can, over real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from tbox.durable import OsStorage, TwoCopies
from tbox.errors import TboxError
from tbox.ota.fetch import (
    Bucket,
    Clock,
    Downloads,
    FetchError,
    FetchSettings,
    Http,
    Interrupted,
    ServerRefused,
    address,
)
from tbox.ota.serve import running

DATA = random.Random(3).randbytes(700_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
ETAG = '"v1"'
PATIENT = FetchSettings(retries_max=2, retry_s=0.01, retry_s_max=0.02, checkpoint_bytes=65_536)
# Impatient, so that a server that brings nothing is given up within the second.
HASTY = msgspec.structs.replace(
    PATIENT, connect_s=2, stall_s=0.3, small_s=0.5, slow_window_s=0.4, slow_bytes_s_min=1000
)

Answer = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request and the raw connection to answer it on."""

    path: str
    headers: dict[str, str]
    connection: socket.socket

    def say(self, head: str, body: bytes = b"") -> None:
        self.connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)

    @property
    def begin(self) -> int:
        """Return where the requested range begins, 0 without one."""
        return int(self.headers.get("range", "bytes=0-")[6:].partition("-")[0])

    def send(self, end: int = len(DATA), etag: str = ETAG, begin: int | None = None) -> None:
        """Answer rightly, but stop at `end`."""
        begin = self.begin if begin is None else begin
        status = "206 Partial Content" if begin else "200 OK"
        span = f"Content-Range: bytes {begin}-{len(DATA) - 1}/{len(DATA)}\n" if begin else ""
        head = f"HTTP/1.1 {status}\nContent-Length: {len(DATA) - begin}\nETag: {etag}\n{span}"
        self.say(head, DATA[begin:end])


@dataclass
class Hostile:
    """A server that answers its n-th request with the n-th of these, and with the last one ever after."""

    answers: list[Answer]
    asked: list[Exchange] = field(default_factory=list)
    url: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)

    def _serve(self, listener: socket.socket) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                exchange = self._read(connection)
                self.asked.append(exchange)
                self.answers[min(len(self.asked), len(self.answers)) - 1](exchange)

    @staticmethod
    def _read(connection: socket.socket) -> Exchange:
        raw = b""
        while b"\r\n\r\n" not in raw:
            raw += connection.recv(4096)
        first, *lines = raw.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Exchange(first.split(" ")[1], headers, connection)


@contextlib.contextmanager
def hostile(*answers: Answer) -> Iterator[Hostile]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = Hostile(list(answers), url=f"http://127.0.0.1:{listener.getsockname()[1]}/file")
    thread = threading.Thread(target=server._serve, args=(listener,))
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def fetch(server: Hostile, directory: Path, settings: FetchSettings = PATIENT, **options: object) -> bytes:
    found = Downloads(Http(settings), OsStorage(), str(directory))
    return Path(found.fetch(server.url, len(DATA), SHA256, **options)).read_bytes()  # type: ignore[arg-type]


def endlessly(head: str, piece: bytes, pause_s: float = 0.0) -> Answer:
    """Answer with a head, then with a piece again and again until the other side has had enough."""

    def answer(exchange: Exchange) -> None:
        exchange.connection.sendall(head.replace("\n", "\r\n").encode())
        while True:
            exchange.connection.sendall(piece)
            time.sleep(pause_s)

    return answer


# --- what goes right -----------------------------------------------------------------------------------


def test_a_file_comes_whole_and_a_second_fetch_asks_for_nothing(tmp_path: Path) -> None:
    with hostile(Exchange.send) as server:
        seen: list[tuple[int, int]] = []
        assert fetch(server, tmp_path, progress=lambda here, all_: seen.append((here, all_))) == DATA
        assert seen[0] == (0, len(DATA)) and seen[-1] == (len(DATA), len(DATA))
        assert [here for here, _ in seen] == sorted(here for here, _ in seen)
        assert fetch(server, tmp_path) == DATA
        assert len(server.asked) == 1


def test_a_broken_connection_is_resumed_where_it_broke(tmp_path: Path) -> None:
    cuts = [150_000, 300_000, 580_000]
    with hostile(*(lambda e, end=end: e.send(end) for end in cuts), Exchange.send) as server:
        assert fetch(server, tmp_path) == DATA
        assert [e.begin for e in server.asked] == [0, *cuts]
        assert {e.headers.get("if-range") for e in server.asked[1:]} == {ETAG}


def test_a_restart_resumes_from_what_was_synced_and_hashes_it_again(tmp_path: Path) -> None:
    done = 0

    def progress(here: int, all_: int) -> None:
        nonlocal done
        done = here

    with hostile(Exchange.send) as server:
        with pytest.raises(Interrupted, match="the window closed"):
            fetch(
                server,
                tmp_path,
                hold=lambda: "the window closed" if done >= 200_000 else "",
                progress=progress,
            )
        assert fetch(server, tmp_path) == DATA  # a new Downloads: nothing but the files is carried over
        assert server.asked[1].begin >= 200_000


@pytest.mark.parametrize("damage", ["flip", "short", "gone", "state", "other"])
def test_what_is_not_as_it_was_written_down_is_not_built_upon(tmp_path: Path, damage: str) -> None:
    part = tmp_path / f"{SHA256}.download"
    with hostile(lambda e: e.send(300_000), Exchange.send) as server:
        with pytest.raises(Interrupted):
            fetch(server, tmp_path, hold=lambda: "stop" if part.exists() and part.stat().st_size else "")
        raw = bytearray(part.read_bytes())
        raw[100] ^= 1
        state = TwoCopies(OsStorage(), str(tmp_path), "reached")
        if damage == "flip":
            part.write_bytes(raw)
        elif damage == "short":
            part.write_bytes(raw[:1000])
        elif damage == "gone":
            part.unlink()
        elif damage == "state":
            for path in tmp_path.glob("reached.*"):
                path.write_bytes(b"")
        else:
            state.write(msgspec.msgpack.encode({"wanted": "0" * 64, "offset": 5}))
        assert fetch(server, tmp_path) == DATA
        assert server.asked[1].begin == 0


def test_bytes_beyond_what_was_written_down_are_cut_off(tmp_path: Path) -> None:
    part = tmp_path / f"{SHA256}.download"
    with hostile(lambda e: e.send(300_000), Exchange.send) as server:
        with pytest.raises(Interrupted):
            fetch(server, tmp_path, hold=lambda: "stop" if part.exists() and part.stat().st_size else "")
        reached = part.stat().st_size
        with part.open("ab") as file:
            file.write(b"torn" * 1000)
        assert fetch(server, tmp_path) == DATA
        assert server.asked[1].begin == reached


def test_a_file_that_changed_at_the_server_is_begun_anew(tmp_path: Path) -> None:
    with hostile(
        lambda e: e.send(200_000, etag='"old"'),
        lambda e: e.send(begin=0) if e.headers["if-range"] == '"old"' else e.send(),
    ) as server:
        assert fetch(server, tmp_path) == DATA


def test_a_file_that_changed_at_a_server_deaf_to_if_range_is_begun_anew(tmp_path: Path) -> None:
    with hostile(
        lambda e: e.send(200_000, etag='"old"'),
        lambda e: e.send(etag='"new"'),
        lambda e: e.send(etag='"new"'),
    ) as server:
        assert fetch(server, tmp_path) == DATA
        assert [e.begin for e in server.asked] == [0, 200_000, 0]


def test_a_server_without_ranges_begins_anew(tmp_path: Path) -> None:
    with hostile(lambda e: e.send(200_000), lambda e: e.send(begin=0)) as server:
        assert fetch(server, tmp_path) == DATA


def test_a_range_the_server_cannot_serve_begins_anew(tmp_path: Path) -> None:
    with hostile(
        lambda e: e.send(200_000),
        lambda e: e.say("HTTP/1.1 416 Range Not Satisfiable\nContent-Length: 0\n"),
        Exchange.send,
    ) as server:
        assert fetch(server, tmp_path) == DATA


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    with hostile(
        lambda e: e.say("HTTP/1.1 503 Busy\nRetry-After: 86400\nContent-Length: 0\n"), Exchange.send
    ) as server:
        assert fetch(server, tmp_path) == DATA  # and not after a day


def test_a_redirect_on_the_same_host_is_followed(tmp_path: Path) -> None:
    with hostile(
        lambda e: e.say("HTTP/1.1 302 Found\nLocation: /elsewhere\nContent-Length: 0\n"), Exchange.send
    ) as server:
        assert fetch(server, tmp_path) == DATA
        assert server.asked[1].path == "/elsewhere"


def test_the_shipped_server_and_the_fetcher_agree_about_ranges(tmp_path: Path) -> None:
    (tmp_path / "repo" / "targets").mkdir(parents=True)
    (tmp_path / "device").mkdir()
    (tmp_path / "repo" / "targets" / "file").write_bytes(DATA)
    here = 0

    def progress(done: int, all_: int) -> None:
        nonlocal here
        here = done

    with running(tmp_path / "repo") as base:
        server = Hostile([], url=f"{base}/targets/file")
        with pytest.raises(Interrupted):
            fetch(
                server, tmp_path / "device", progress=progress, hold=lambda: "stop" if here > 300_000 else ""
            )
        assert fetch(server, tmp_path / "device", progress=progress) == DATA


def test_another_download_makes_room(tmp_path: Path) -> None:
    (tmp_path / f"{'0' * 64}.download").write_bytes(b"old")
    with hostile(Exchange.send) as server:
        fetch(server, tmp_path)
    assert [path.name for path in tmp_path.glob("*.download")] == [f"{SHA256}.download"]


# --- what is refused -----------------------------------------------------------------------------------

OTHER = DATA[:-1] + bytes([DATA[-1] ^ 1])


def whole(body: bytes, *headers: str, length: int | None = None) -> Answer:
    lines = "".join(f"{line}\n" for line in headers)
    size = len(body) if length is None else length
    return lambda e: e.say(f"HTTP/1.1 200 OK\nContent-Length: {size}\n{lines}", body)


def ranged(content_range: str) -> Answer:
    head = f"HTTP/1.1 206 Partial Content\nContent-Length: 9\nETag: {ETAG}\nContent-Range: {content_range}\n"
    return lambda e: e.say(head, b"123456789")


def cut(exchange: Exchange) -> None:
    exchange.send(200_000)


REFUSED: dict[str, tuple[list[Answer], str]] = {
    "other content": ([whole(OTHER)], "not the signed file"),
    "longer": ([whole(DATA + b"x")], "700001 bytes, 700000 are signed"),
    "shorter": ([whole(DATA[:-1])], "699999 bytes, 700000 are signed"),
    "longer than it says": (
        [lambda e: e.say("HTTP/1.1 200 OK\n", DATA + b"x")],
        "sends more than the 700000 signed bytes",
    ),
    "gzip": ([whole(DATA, "Content-Encoding: gzip")], "content encoding gzip"),
    "another host": (
        [lambda e: e.say("HTTP/1.1 302 Found\nLocation: http://localhost:1/\n")],
        "redirects to another host",
    ),
    "another port": (
        [lambda e: e.say("HTTP/1.1 301 Moved\nLocation: http://127.0.0.1:1/\n")],
        "redirects to another host",
    ),
    "a file": (
        [lambda e: e.say("HTTP/1.1 307 Temporary\nLocation: file:///etc/passwd\n")],
        "something else than http",
    ),
    "redirects for ever": (
        [lambda e: e.say(f"HTTP/1.1 308 Permanent\nLocation: {e.path}\n")],
        "more than 3 redirects",
    ),
    "gone": ([lambda e: e.say("HTTP/1.1 404 Not Found\nContent-Length: 0\n")], "HTTP 404"),
    "forbidden": ([lambda e: e.say("HTTP/1.1 403 Forbidden\nContent-Length: 0\n")], "HTTP 403"),
    "a range not asked for": ([ranged("bytes 0-8/700000")], "HTTP 206"),
    "another range": ([cut, ranged("bytes 0-8/700000")], "another range"),
    "a range of another file": ([cut, ranged("bytes 200000-200008/700001")], "another range"),
    "a range without an end": ([cut, ranged("bytes 200000-/700000")], "another range"),
    "a range of unknown length": ([cut, ranged("bytes 200000-200008/*")], "another range"),
    "a range that ends before it begins": ([cut, ranged("bytes 200000-8/700000")], "contradicts itself"),
    "a range of nonsense": ([cut, ranged("lines 1-2/3")], "another range"),
    "no range at all": ([cut, ranged("")], "another range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_lies_is_refused_and_nothing_of_it_kept(tmp_path: Path, case: str) -> None:
    answers, reason = REFUSED[case]
    with hostile(*answers) as server, pytest.raises(ServerRefused, match=reason) as caught:
        fetch(server, tmp_path)
    assert "\n" not in str(caught.value)
    part = tmp_path / f"{SHA256}.download"
    assert not part.exists() or part.stat().st_size == 0


BROKEN: dict[str, Answer] = {
    "hangs up": lambda e: None,
    "says nothing": lambda e: time.sleep(0.5),
    "is no web server": lambda e: e.connection.sendall(b"SSH-2.0-OpenSSH\r\n"),
    "drips its head": endlessly("", b"H", 0.05),
    "drips its headers": endlessly("HTTP/1.1 200 OK\n", b"X: y\r\n", 0.05),
    "sends headers for ever": endlessly("HTTP/1.1 200 OK\n", b"X: y\r\n" * 50),
    "drips its body": endlessly(f"HTTP/1.1 200 OK\nContent-Length: {len(DATA)}\n\n", b"x", 0.02),
    "fails": lambda e: e.say("HTTP/1.1 500 Oops\nContent-Length: 0\n"),
    "breaks its chunks": lambda e: e.say("HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n", b"zz\r\n"),
    "ends early each time": lambda e: e.send(e.begin + 10),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_server_that_brings_nothing_is_given_up(tmp_path: Path, case: str) -> None:
    with hostile(BROKEN[case]) as server, pytest.raises(FetchError, match="given up after 3 attempts"):
        fetch(server, tmp_path, HASTY)


def test_nobody_there_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(FetchError, match="given up"):
        fetch(Hostile([], url=f"http://127.0.0.1:{port}/"), tmp_path)


def test_a_full_disk_is_not_blamed_on_the_server(tmp_path: Path) -> None:
    class Full(OsStorage):
        def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
            raise OSError(28, "No space left on device")

    with hostile(Exchange.send) as server, pytest.raises(OSError, match="No space left"):
        Downloads(Http(PATIENT), Full(), str(tmp_path)).fetch(server.url, len(DATA), SHA256)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/y",
        "file:///etc/passwd",
        "http://",
        "http://user:pw@host/",
        "http://host:x/",
        "//host",
        "http://ü/",
    ],
)
def test_a_url_that_is_not_plain_http_is_refused(url: str) -> None:
    with pytest.raises(TboxError, match="not an http or https URL"):
        address(url)


# --- small files ---------------------------------------------------------------------------------------


def test_a_small_file_is_bounded_in_size_and_time() -> None:
    http = Http(PATIENT)
    with hostile(whole(b"x" * 100)) as server:
        assert http.small(server.url, 100) == b"x" * 100
        with pytest.raises(ServerRefused, match="more than 99 bytes"):
            http.small(server.url, 99)
    for_ever = endlessly("HTTP/1.1 200 OK\n\n", b"x" * 60_000)
    with hostile(for_ever) as server, pytest.raises(ServerRefused, match="more than 512000 bytes"):
        http.small(server.url, 512_000)
    drips = endlessly("HTTP/1.1 200 OK\n\n", b"x", 0.02)
    with hostile(drips) as server, pytest.raises(FetchError, match=r"takes too long|timed out"):
        Http(HASTY).small(server.url, 1 << 20)


def test_a_small_file_that_ends_early_or_comes_packed_is_refused() -> None:
    http = Http(PATIENT)
    with hostile(whole(b"x" * 10, length=20)) as server, pytest.raises(FetchError, match="ended after 10"):
        http.small(server.url, 100)
    with hostile(whole(b"x", "Content-Encoding: br")) as server, pytest.raises(ServerRefused, match="br"):
        http.small(server.url, 100)


def test_a_small_file_that_is_not_there_is_none_and_other_failures_are_errors() -> None:
    http = Http(PATIENT)
    for status in (403, 404):
        with hostile(lambda e, s=status: e.say(f"HTTP/1.1 {s} No\nContent-Length: 0\n")) as server:  # type: ignore[misc]
            assert http.small(server.url, 100) is None
    with hostile(BROKEN["fails"]) as server, pytest.raises(FetchError, match="HTTP 500"):
        http.small(server.url, 100)


# --- rates ---------------------------------------------------------------------------------------------


def test_the_bucket_lets_through_its_rate_and_a_seconds_worth_at_once() -> None:
    bucket = Bucket(1000, 0.0)
    assert bucket.take(1000, 0.0) == 0.0
    assert bucket.take(500, 0.0) == 0.5
    assert bucket.take(500, 1.0) == 0.0
    assert bucket.take(1, 1000.0) == 0.0
    assert bucket.take(1999, 1000.0) == 1.0
    assert Bucket(0, 0.0).take(1 << 30, 0.0) == 0.0


def test_a_download_keeps_to_its_rate_and_waits_without_deaf_ears(tmp_path: Path) -> None:
    now, slept = 0.0, 0.0

    def sleep(seconds: float) -> None:
        nonlocal now, slept
        now, slept = now + seconds, slept + seconds

    settings = msgspec.structs.replace(PATIENT, rate_bytes_s=100_000)
    with hostile(Exchange.send) as server:
        http = Http(settings, clock=Clock(lambda: now, sleep))
        asked = 0

        def hold() -> str:
            nonlocal asked
            asked += 1
            return ""

        Downloads(http, OsStorage(), str(tmp_path)).fetch(server.url, len(DATA), SHA256, hold)
    assert slept == pytest.approx((len(DATA) - 100_000) / 100_000, rel=0.1)
    assert asked > slept / 0.5
