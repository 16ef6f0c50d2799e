"""The control socket answers, streams, refuses in words, and outlives clients that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbox.control import SUBSCRIBER_LINES_MAX, ControlError, ControlServer, Feed, Message, request, stream
from tbox.errors import Refused, TboxError


def refuse(_message: Message) -> Message:
    raise TboxError("no such record", mend="look at `tbox spool stat`")


@pytest.fixture
def feed() -> Feed:
    return Feed()


@pytest.fixture
def server(tmp_path: Path, feed: Feed) -> Iterator[str]:
    path = str(tmp_path / "control.sock")
    stopped = threading.Event()
    control = ControlServer(
        path,
        {"status": lambda m: {"echo": m}, "refuse": refuse, "tail": lambda _m: feed.subscribe(stopped)},
    )
    control.start()
    yield path
    stopped.set()
    control.close()


def test_a_request_is_answered(server: str) -> None:
    assert request(server, {"cmd": "status", "x": 1}) == {"echo": {"cmd": "status", "x": 1}}


def test_a_refusal_arrives_as_one_line(server: str) -> None:
    with pytest.raises(Refused, match="no such record; look at"):
        request(server, {"cmd": "refuse"})


def test_an_unknown_command_names_those_that_exist(server: str) -> None:
    with pytest.raises(Refused, match="refuse, status, tail"):
        request(server, {"cmd": "dance"})


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b"\xff\n", b'"cmd"\n', b'{"cmd": {}}\n'])
def test_garbage_is_refused_and_the_server_lives(server: str, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server)
        sock.sendall(line)
        assert b"error" in sock.recv(4096)
    assert "echo" in request(server, {"cmd": "status"})


def test_a_stream_carries_what_is_published(server: str, feed: Feed) -> None:
    answers = stream(server, {"cmd": "tail"}, timeout_s=10)
    first = next(answers)  # subscribed by now: an empty keep-alive, or nothing published yet
    feed.publish({"id": 7})
    while not first:
        first = next(answers)
    assert first == {"id": 7}
    answers.close()


def test_a_slow_subscriber_is_told_how_much_it_missed(feed: Feed) -> None:
    stopped = threading.Event()
    lines = feed.subscribe(stopped)
    assert next(lines) == {}
    for n in range(SUBSCRIBER_LINES_MAX + 5):
        feed.publish({"n": n})
    assert [next(lines)["n"] for _ in range(SUBSCRIBER_LINES_MAX)] == list(range(SUBSCRIBER_LINES_MAX))
    assert next(lines) == {"missed": 5}
    lines.close()
    assert not feed.wanted


def test_nobody_there_is_said_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="start `tbox run`"):
        request(str(tmp_path / "none.sock"), {"cmd": "status"})


def test_a_socket_left_by_a_killed_agent_is_taken_over_and_a_live_one_is_not(
    tmp_path: Path, server: str
) -> None:
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    ControlServer(str(stale), {}).close()
    with pytest.raises(ControlError, match="stop the agent"):
        ControlServer(server, {})
    assert "echo" in request(server, {"cmd": "status"})


def test_only_the_owner_may_open_it(server: str) -> None:
    assert Path(server).stat().st_mode & 0o777 == 0o600
