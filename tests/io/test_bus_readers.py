"""Every bus that is not SocketCAN behind recv_batch, and the way onto it; real buses, one of which breaks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import can
import numpy as np
import pytest

from tbox.bus import python_can
from tbox.bus.reader import (
    BusError,
    BusReader,
    BusSpec,
    BusWriter,
    NotAllowed,
    open_reader,
    parse_bus_url,
)
from tbox.bus.spec import BATCH_FRAMES_MAX
from tbox.model import BusState, CanSend

DEADLINE_S = 30.0


@pytest.fixture(params=["virtual", "tbox"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}:{tmp_path / 'bus'}"


@pytest.fixture
def reader(url: str) -> Iterator[BusReader]:
    one = open_reader(parse_bus_url(url), 3)
    yield one
    one.close()


@pytest.fixture
def peer(url: str, reader: BusReader) -> Iterator[can.BusABC]:
    del reader  # opened first: a virtual bus has no memory
    with python_can.open_bus(parse_bus_url(url)) as bus:
        yield bus


def message(number: int, **more: Any) -> can.Message:
    return can.Message(arbitration_id=number, is_extended_id=False, **more)


def read(reader: BusReader, count: int) -> Any:
    frames: list[Any] = []
    until_s = time.monotonic() + DEADLINE_S
    while sum(len(part) for part in frames) < count:
        assert time.monotonic() < until_s
        if batch := reader.recv_batch(0.1):
            assert batch.channel == 3
            frames.append(batch.frames)
    return np.concatenate(frames)


def test_frames_come_in_order_with_times_of_the_monotonic_clock(reader: BusReader, peer: can.BusABC) -> None:
    begin_ns = time.monotonic_ns()
    for number in range(10):
        peer.send(message(number, data=bytes(number), is_fd=number > 8))
    t_ns: list[int] = []
    numbers: list[int] = []
    while len(numbers) < 10:
        batch = reader.recv_batch(DEADLINE_S)
        assert batch is not None
        numbers += batch.frames["id"].tolist()
        t_ns += batch.t_ns.tolist()
    assert numbers == list(range(10)) and t_ns == sorted(t_ns)
    # Stamps of the wall clock are turned: between two readings of it lies some jitter.
    assert begin_ns - 10**8 < t_ns[0] and t_ns[-1] <= time.monotonic_ns()
    assert reader.recv_batch(0) is None


def test_everything_pending_comes_in_few_batches(reader: BusReader, peer: can.BusABC) -> None:
    for number in range(300):
        peer.send(message(number))
    batch = reader.recv_batch(DEADLINE_S)
    assert batch is not None and 100 <= len(batch) <= BATCH_FRAMES_MAX


def test_error_and_remote_frames_are_counted_and_left_out(reader: BusReader, peer: can.BusABC) -> None:
    peer.send(message(0x40, is_error_frame=True))
    peer.send(message(5, is_remote_frame=True, dlc=4))
    peer.send(message(6))
    assert read(reader, 1)["id"].tolist() == [6]
    counters = reader.counters()
    assert (counters.errors, counters.remote, counters.received, counters.out) == (1, 1, 3, 1)
    assert counters.error_frames == {"bus_off": 1}


def test_the_writer_sends_what_is_listed_and_counts_the_rest(reader: BusReader, peer: can.BusABC) -> None:
    writer = BusWriter(reader, [0x123])
    assert writer.send(CanSend(0, 0x123, b"\1\2"))
    got = peer.recv(DEADLINE_S)
    assert got is not None and (got.arbitration_id, bytes(got.data), got.is_fd) == (0x123, b"\1\2", True)
    with pytest.raises(NotAllowed) as refused:
        writer.send(CanSend(0, 0x124, b""))
    assert refused.value.exit_code == 1 and (writer.sent, writer.refused, writer.failed) == (1, 1, 0)


def test_listen_only_is_the_default(reader: BusReader) -> None:
    with pytest.raises(NotAllowed):
        BusWriter(reader).send(CanSend(0, 1, b""))


class Fragile(can.BusABC):
    """A bus of python-can's virtual kind whose driver fails when it is told to."""

    failing = False
    opened = 0

    def __init__(self, channel: Any, **_other: Any) -> None:
        if Fragile.failing:
            raise can.CanInitializationError("unplugged")
        Fragile.opened += 1
        self._inner = can.Bus(interface="virtual", channel=channel, ignore_config=True)
        super().__init__(channel=channel)

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        if Fragile.failing:
            raise can.CanOperationError("unplugged")
        return self._inner.recv(timeout), False

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        if Fragile.failing:
            raise can.CanOperationError("unplugged")
        self._inner.send(msg, timeout)

    def shutdown(self) -> None:
        super().shutdown()
        self._inner.shutdown()


@pytest.fixture
def fragile(monkeypatch: pytest.MonkeyPatch) -> Iterator[BusReader]:
    original = can.interface.Bus
    monkeypatch.setattr(
        can, "Bus", lambda interface, **given: (
            Fragile(**given) if interface == "pcan" else original(interface=interface, **given)
        ),
    )  # fmt: skip
    monkeypatch.setattr(Fragile, "failing", False)
    one = open_reader(BusSpec(interface="pcan", channel="fragile"), 3)
    yield one
    one.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s


def test_a_driver_that_fails_is_reopened_and_nothing_is_raised(
    fragile: BusReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = BusWriter(fragile, [1])
    with can.Bus(interface="virtual", channel="fragile", ignore_config=True) as peer:
        peer.send(message(1))
        assert len(read(fragile, 1)) == 1
        monkeypatch.setattr(Fragile, "failing", True)
        wait_for(lambda: fragile.recv_batch(0.05) is None and fragile.counters().state is BusState.GONE)
        assert not writer.send(CanSend(0, 1, b"")) and writer.failed == 1
        monkeypatch.setattr(Fragile, "failing", False)
        wait_for(lambda: fragile.recv_batch(0.05) is None and fragile.counters().state is BusState.UP)
        peer.send(message(2))
        assert read(fragile, 1)["id"].tolist() == [2]
    assert fragile.counters().reopened == 1


def test_a_driver_that_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(can, "Bus", lambda interface, **given: Fragile(**given))
    monkeypatch.setattr(Fragile, "failing", True)
    reader = open_reader(BusSpec(interface="pcan", channel="late"), 0)
    assert reader.recv_batch(0.01) is None and reader.counters().state is BusState.GONE
    monkeypatch.setattr(can, "Bus", can.interface.Bus)
    monkeypatch.setattr(Fragile, "failing", False)
    monkeypatch.setattr(python_can, "open_bus", lambda spec: can.interface.Bus(
        interface="virtual", channel=spec.channel, ignore_config=True))  # fmt: skip
    wait_for(lambda: reader.recv_batch(0.05) is None and reader.counters().state is BusState.UP)
    assert reader.counters().reopened == 0
    reader.close()


def test_a_driver_whose_clock_is_its_own_is_dated_by_ours(tmp_path: Path) -> None:
    reader = open_reader(parse_bus_url(f"virtual:{tmp_path}"), 0)
    with can.Bus(
        interface="virtual", channel=str(tmp_path), preserve_timestamps=True, ignore_config=True
    ) as bus:
        begin_ns = time.monotonic_ns()
        bus.send(message(1, timestamp=12.5))
        batch = reader.recv_batch(DEADLINE_S)
    assert batch is not None and begin_ns <= batch.t_ns[0] <= time.monotonic_ns()
    reader.close()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (BusSpec(interface="soketcan", channel="x"), "interfaces are"),
        (BusSpec(interface="recording", channel="/nowhere"), "cannot read"),
        (BusSpec(interface="recording", channel="x", options={"speed": 1}), "unknown options speed"),
    ],
)
def test_a_bus_that_can_never_be_is_refused_at_once(spec: BusSpec, words: str) -> None:
    with pytest.raises(Exception, match=words) as caught:
        open_reader(spec, 0)
    assert getattr(caught.value, "exit_code", None) == 2


def test_a_recording_serves_the_same_interface(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text(
        "(5.0) can0 123#01\n(5.5) can1 124#02\nrubbish\n(6.0) can0 125#R\n(6.5) can0 20000040#\n"
        "(7.0) can0 126#\n"
    )
    spec = BusSpec(interface="recording", channel=str(path), options={"log_channel": 0})
    reader = open_reader(spec, 3)
    batch = reader.recv_batch(0)
    assert batch is not None and batch.channel == 3
    assert batch.frames["id"].tolist() == [0x123, 0x126] and batch.t_ns.tolist() == [0, 2 * 10**9]
    assert reader.recv_batch(0) is None and reader.counters().state is BusState.GONE
    counters = reader.counters()
    assert (counters.errors, counters.remote, counters.malformed, counters.out) == (1, 1, 1, 2)
    assert counters.into == counters.out + sum(counters.dropped.values())
    with pytest.raises(BusError, match="a recording takes none"):
        reader.send(CanSend(0, 1, b""))
    reader.close()
