"""The SocketCAN reader on a real interface: every frame or a count, stamps, errors, down and up again."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import can
import numpy as np
import pytest

from tbox.bus.socketcan import SocketCanReader
from tbox.bus.spec import BusCounters, BusError
from tbox.bus.writer import BusWriter, NotAllowed
from tbox.model import (
    CAN_EFF_FLAG,
    CAN_ERR_FLAG,
    CANFD_BRS,
    CANFD_FDF,
    FRAME_DTYPE,
    NS_PER_S,
    BusState,
    CanSend,
    FrameBatch,
)

Open = Callable[..., SocketCanReader]
Link = Callable[[str], None]
Wait = Callable[..., None]
Flood = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def sender() -> Iterator[can.BusABC]:
    with can.Bus(interface="socketcan", channel="vcan0", fd=True, ignore_config=True) as bus:
        yield bus


def message(number: int, size: int = 8, **more: object) -> can.Message:
    return can.Message(arbitration_id=number, is_extended_id=False, data=bytes(range(size)), **more)  # type: ignore[arg-type]


def read(reader: SocketCanReader, count: int) -> list[FrameBatch]:
    """Read until `count` frames came; fails when they do not."""
    batches: list[FrameBatch] = []
    until_s = time.monotonic() + 60
    while sum(map(len, batches)) < count:
        assert time.monotonic() < until_s, f"{sum(map(len, batches))} of {count} frames came"
        if batch := reader.recv_batch(0.2):
            batches.append(batch)
    return batches


def in_balance(counters: BusCounters, handed_on: int) -> None:
    assert counters.into == counters.out + sum(counters.dropped.values())
    assert counters.out == handed_on


def test_classic_and_fd_frames_arrive_whole_in_order_and_zero_padded(
    reader: Open, sender: can.BusABC
) -> None:
    ours = reader()
    sender.send(message(0x10, 64, is_fd=True, bitrate_switch=True))
    sender.send(message(0x11, 3))
    sender.send(can.Message(arbitration_id=0x1ABCDEF0, data=b"\xff" * 8))
    sender.send(message(0x12, 12, is_fd=True))
    sender.send(message(0x13, 0))
    frames = np.concatenate([batch.frames for batch in read(ours, 5)])
    assert frames.dtype == FRAME_DTYPE
    assert frames["id"].tolist() == [0x10, 0x11, 0x1ABCDEF0 | CAN_EFF_FLAG, 0x12, 0x13]
    assert frames["len"].tolist() == [64, 3, 8, 12, 0]
    assert frames["flags"].tolist() == [CANFD_FDF | CANFD_BRS, 0, 0, CANFD_FDF, 0]
    assert frames["data"][0].tolist() == list(range(64))
    for row, size in zip(frames["data"][1:], [3, 8, 12, 0], strict=True):
        assert not row[size:].any(), "what is behind the payload is not the frame's"
    in_balance(ours.counters(), 5)


def test_batches_are_copies_that_the_next_read_leaves_alone(reader: Open, sender: can.BusABC) -> None:
    ours = reader()
    sender.send(message(1))
    (first,) = read(ours, 1)
    before = first.frames.copy(), first.t_ns.copy()
    for number in range(600):
        sender.send(message(2 + number % 5, 5))
    read(ours, 600)
    assert (first.frames == before[0]).all() and (first.t_ns == before[1]).all()


def test_times_are_the_kernels_in_monotonic_ns_and_in_order(reader: Open, sender: can.BusABC) -> None:
    ours = reader()
    begin_ns = time.monotonic_ns()
    sender.send(message(1))
    between_ns = time.monotonic_ns()
    time.sleep(0.05)
    sender.send(message(2))
    end_ns = time.monotonic_ns()
    time.sleep(0.05)  # the reader comes late; the stamps do not
    t_ns = np.concatenate([batch.t_ns for batch in read(ours, 2)])
    slack_ns = 5_000_000
    assert begin_ns - slack_ns <= t_ns[0] <= between_ns + slack_ns
    assert between_ns <= t_ns[1] <= end_ns + slack_ns
    assert t_ns[1] - t_ns[0] > 40_000_000


def test_error_frames_are_counted_by_class_and_remote_frames_too(reader: Open, sender: can.BusABC) -> None:
    ours = reader()
    with socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) as raw:
        raw.bind(("vcan0",))
        for classes in (0x40, 0x04 | 0x08, 0x04, 0x800):
            raw.send(struct.pack("<IB3x8x", CAN_ERR_FLAG | classes, 8))
    sender.send(message(5, 0, is_remote_frame=True))
    sender.send(message(6))
    (batch,) = read(ours, 1)
    assert batch.frames["id"].tolist() == [6]
    counters = ours.counters()
    assert counters.error_frames == {"bus_off": 1, "controller": 2, "protocol": 1, "other": 1}
    assert (counters.errors, counters.remote, counters.received) == (4, 1, 6)
    in_balance(counters, 1)


def test_the_kernel_passes_only_ids_on_the_list_when_asked(reader: Open, sender: can.BusABC) -> None:
    every, some = reader(), reader(filter=True, ids=[0x11, 0x222 | CAN_EFF_FLAG])
    unasked = reader(ids=[0x11])
    for number in (0x10, 0x11, 0x222):
        sender.send(message(number))
        sender.send(can.Message(arbitration_id=number, data=b""))
    assert sum(map(len, read(every, 6))) == sum(map(len, read(unasked, 6))) == 6
    got = np.concatenate([batch.frames["id"] for batch in read(some, 2)])
    assert got.tolist() == [0x11, 0x222 | CAN_EFF_FLAG]
    assert some.recv_batch(0.05) is None and some.counters().received == 2


def test_more_ids_than_the_kernel_filters_are_not_filtered(reader: Open, sender: can.BusABC) -> None:
    ours = reader(filter=True, ids=range(0x100, 0x100 + 513))
    sender.send(message(1))
    assert sum(map(len, read(ours, 1))) == 1


def test_a_classic_reader_hears_no_fd_frames(reader: Open, sender: can.BusABC) -> None:
    ours = reader(fd=False)
    sender.send(message(1, 64, is_fd=True))
    sender.send(message(2))
    (batch,) = read(ours, 1)
    assert batch.frames["id"].tolist() == [2]


def test_several_buses_are_read_side_by_side(reader: Open, sender: can.BusABC, link: Link) -> None:
    link("add vcan1 type vcan")
    try:
        link("set vcan1 mtu 72 up")
        first, second = reader(), reader("vcan1")
        with can.Bus(interface="socketcan", channel="vcan1", fd=True, ignore_config=True) as other:
            other.send(message(2))
        sender.send(message(1))
        assert [read(one, 1)[0].frames["id"].tolist() for one in (first, second)] == [[1], [2]]
    finally:
        link("del vcan1")


# --- writing --------------------------------------------------------------------------------------------


def test_only_listed_ids_reach_the_bus_and_all_are_counted(reader: Open, sender: can.BusABC) -> None:
    ours = reader()
    writer = BusWriter(ours, {0x7F0, 0x1F0 | CAN_EFF_FLAG})
    assert writer.send(CanSend(0, 0x7F0, b"\1\2\3\4\5\6\7\x08\x09"))
    assert writer.send(CanSend(0, 0x1F0 | CAN_EFF_FLAG, b"\1", fd=False))
    with pytest.raises(NotAllowed, match="7F1 may not be sent"):
        writer.send(CanSend(0, 0x7F1, b"\1"))
    first, second = sender.recv(10), sender.recv(10)
    assert first is not None and (first.arbitration_id, first.is_fd, first.dlc) == (0x7F0, True, 12)
    assert second is not None and second.is_extended_id and not second.is_fd
    assert sender.recv(0.05) is None
    assert (writer.sent, writer.refused, writer.failed, ours.counters().sent) == (2, 1, 0, 2)
    assert ours.recv_batch(0.05) is None, "its own frames do not come back"


# --- at speed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rate", [10_000, 23_000])
def test_a_stall_of_200_ms_loses_nothing_in_a_raised_buffer(
    reader: Open, flood: Flood, needs: Callable[..., None], rate: int
) -> None:
    needs("root")
    ours = reader()
    assert ours.counters().rcvbuf_forced
    total = 2 * rate
    process = flood(total, rate)
    numbers: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    count = 0
    stalls = 0
    while count < total:
        batch = ours.recv_batch(5.0)
        assert batch is not None, f"{count} of {total} came"
        numbers.append(np.ascontiguousarray(batch.frames["data"][:, :8]).view("<i8").ravel())
        count += len(batch)
        if count > (stalls + 1) * total // 5 and stalls < 4:
            stalls += 1
            time.sleep(0.2)
    assert process.communicate(timeout=60)[0] == b"%d\n" % total
    assert (np.concatenate(numbers) == np.arange(total)).all()
    ours.recv_batch(0)
    counters = ours.counters()
    assert stalls == 4 and counters.kernel_dropped == 0
    in_balance(counters, total)


@pytest.mark.slow
def test_what_the_kernel_drops_is_counted_to_the_frame(reader: Open, flood: Flood) -> None:
    ours = reader(rcvbuf_bytes=64 * 1024)
    total = 20_000
    process = flood(total, 1_000_000)
    assert process.communicate(timeout=60)[0] == b"%d\n" % total  # nobody reads meanwhile
    count = 0
    while batch := ours.recv_batch(0.2):
        count += len(batch)
    counters = ours.counters()
    assert counters.kernel_dropped > total // 2
    assert count + counters.kernel_dropped == total
    in_balance(counters, count)


def test_drops_after_the_last_frame_are_told_too(reader: Open, sender: can.BusABC) -> None:
    ours = reader(rcvbuf_bytes=64 * 1024)
    for _ in range(2000):
        sender.send(message(1))
    count = 0
    while batch := ours.recv_batch(0.05):
        count += len(batch)
    assert count + ours.counters().kernel_dropped == 2000


def test_without_privilege_the_buffer_is_what_the_kernel_allows_and_says_so(
    reader: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    privileged = reader().counters()
    with monkeypatch.context() as patch:
        # Only the privileged option is refused; everything else is the real socket.
        class Unprivileged(socket.socket):
            def setsockopt(self, *args: Any) -> None:
                if args[1] == 33:
                    raise PermissionError
                super().setsockopt(*args)

        patch.setattr(socket, "socket", Unprivileged)
        plain = reader().counters()
    assert plain.rcvbuf_forced is False and plain.rcvbuf_bytes is not None
    assert privileged.rcvbuf_bytes is not None and plain.rcvbuf_bytes <= privileged.rcvbuf_bytes


# --- down, up, gone -------------------------------------------------------------------------------------


def read_until(reader: SocketCanReader, wait_for: Wait, state: BusState) -> int:
    count = 0

    def reached() -> bool:
        nonlocal count
        count += len(reader.recv_batch(0.05) or ())
        return reader.counters().state is state

    wait_for(reached, f"state {state.name}")
    return count


def test_an_interface_that_goes_down_and_up_is_read_again(
    reader: Open, sender: can.BusABC, link: Link, wait_for: Wait
) -> None:
    ours = reader()
    for number in range(10):
        sender.send(message(number))
    link("set vcan0 down")
    held = read_until(ours, wait_for, BusState.DOWN)
    while batch := ours.recv_batch(0.05):
        held += len(batch)
    assert held == 10, "what was received before the fall is not lost"
    with pytest.raises(BusError, match="was not sent"):
        ours.send(CanSend(0, 1, b""))
    link("set vcan0 up")
    read_until(ours, wait_for, BusState.UP)
    with can.Bus(interface="socketcan", channel="vcan0", fd=True, ignore_config=True) as again:
        again.send(message(0x77))
    assert read(ours, 1)[0].frames["id"].tolist() == [0x77]
    counters = ours.counters()
    assert counters.reopened == 1 and counters.send_failed == 1
    in_balance(counters, 11)


def test_an_interface_that_is_removed_and_made_anew_is_opened_again(
    reader: Open, sender: can.BusABC, link: Link, wait_for: Wait
) -> None:
    ours = reader()
    for number in range(10):
        sender.send(message(number))
    link("del vcan0")
    held = read_until(ours, wait_for, BusState.GONE)
    wait_for(lambda: (ours.recv_batch(0.01), ours._sock is None)[1], "the old socket's end")
    held = ours.counters().out
    assert held == 10, "what was received before it was removed is not lost"
    link("add vcan0 type vcan")
    read_until(ours, wait_for, BusState.DOWN)
    link("set vcan0 mtu 72 up")
    read_until(ours, wait_for, BusState.UP)
    with can.Bus(interface="socketcan", channel="vcan0", fd=True, ignore_config=True) as again:
        again.send(message(0x78))
    assert read(ours, 1)[0].frames["id"].tolist() == [0x78]
    in_balance(ours.counters(), 11)


def test_a_reader_may_be_started_before_its_interface_exists(
    reader: Open, link: Link, wait_for: Wait
) -> None:
    link("del vcan0")
    ours = reader()
    assert ours.recv_batch(0.01) is None and ours.counters().state is BusState.GONE
    link("add vcan0 type vcan")
    link("set vcan0 mtu 72 up")
    read_until(ours, wait_for, BusState.UP)
    assert ours.counters().reopened == 0, "the first opening is none again"


def test_a_jump_of_the_wall_clock_moves_no_frame(
    reader: Open, sender: can.BusABC, needs: Callable[..., None]
) -> None:
    needs("root")
    ours = reader()
    t_ns: list[int] = []
    wall_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
    begin_ns = time.monotonic_ns()
    try:
        for step_s in (3600, -7200, 86400):
            sender.send(message(1))
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + step_s * NS_PER_S)
            t_ns += read(ours, 1)[0].t_ns.tolist()
            assert t_ns[-1] <= time.monotonic_ns()
    except PermissionError:
        pytest.skip("may not set the clock")
    finally:
        passed_ns = time.monotonic_ns() - begin_ns
        time.clock_settime_ns(time.CLOCK_REALTIME, wall_ns + passed_ns)
    assert t_ns == sorted(t_ns)
