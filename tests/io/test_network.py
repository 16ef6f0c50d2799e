"""The link cutter carries bytes as they are, falls silent without closing, and closes when told to."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator

import pytest

from tbox.sim.network import LinkCutter
from tests.io.uplink_bench import wait_for


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(65536):
                    sock.sendall(data)
            except OSError:
                pass

    def accept() -> None:
        while True:
            try:
                sock, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


def connect(cutter: LinkCutter, timeout_s: float = 30.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", cutter.port), timeout=timeout_s)


def receive(sock: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        data += sock.recv(65536)
    return data


@pytest.mark.parametrize(("latency_s", "loss"), [(0.0, 0.0), (0.005, 0.02)])
def test_bytes_pass_unchanged_and_in_order(echo: int, latency_s: float, loss: float) -> None:
    sent = random.Random(1).randbytes(400_000)
    with (
        LinkCutter(echo, latency_s=latency_s, loss=loss, random=random.Random(2).random) as cutter,
        connect(cutter) as sock,
    ):
        writer = threading.Thread(target=sock.sendall, args=(sent,))
        writer.start()
        assert receive(sock, len(sent)) == sent
        writer.join()


def test_a_cut_is_silent_and_what_was_sent_meanwhile_arrives_afterwards(echo: int) -> None:
    with LinkCutter(echo) as cutter, connect(cutter) as sock:
        sock.sendall(b"before")
        assert receive(sock, 6) == b"before"
        cutter.cut()
        sock.sendall(b"during")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        cutter.restore()
        sock.settimeout(30)
        assert receive(sock, 6) == b"during"


def test_only_the_way_back_can_be_cut(echo: int) -> None:
    with LinkCutter(echo) as cutter, connect(cutter) as sock:
        cutter.cut(up=False)
        sock.sendall(b"hello")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        cutter.restore()
        sock.settimeout(30)
        assert receive(sock, 5) == b"hello"


def test_a_connection_tried_and_given_up_in_the_silence_never_reaches_the_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, LinkCutter(server.getsockname()[1]) as cutter:
        cutter.cut()
        with connect(cutter) as sock:
            sock.sendall(b"CONNECT from the tunnel")
        cutter.restore()
        with connect(cutter) as sock:
            sock.sendall(b"CONNECT after it")
            accepted, _ = server.accept()
            with accepted:
                accepted.settimeout(30)
                assert accepted.recv(100) == b"CONNECT after it"


def test_a_reset_closes_the_connection_and_new_ones_work(echo: int) -> None:
    with LinkCutter(echo) as cutter:
        with connect(cutter) as sock:
            sock.sendall(b"x")
            receive(sock, 1)
            cutter.reset()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        with connect(cutter) as sock:
            sock.sendall(b"y")
            assert receive(sock, 1) == b"y"


def test_when_the_broker_closes_the_device_hears_of_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        LinkCutter(server.getsockname()[1]) as cutter,
        connect(cutter) as sock,
    ):
        accepted, _ = server.accept()
        accepted.sendall(b"bye")
        accepted.close()
        assert receive(sock, 3) == b"bye"
        assert sock.recv(1) == b""


def test_without_a_broker_behind_it_a_connection_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with LinkCutter(port) as cutter, connect(cutter) as sock:
        assert sock.recv(1) == b""


def test_closing_the_cutter_ends_its_thread(echo: int) -> None:
    cutter = LinkCutter(echo)
    cutter.close()
    wait_for("the thread to end", lambda: not cutter._thread.is_alive())
