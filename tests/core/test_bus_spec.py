"""Names of buses, the counters' balance, backoff, and what every reader does with its frames."""

from __future__ import annotations

import can
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.bus.backoff import REOPEN_FIRST_MS, REOPEN_LIMIT_MS, Backoff
from tbox.bus.frames import (
    FD_LENGTHS,
    FRAME,
    frames_of,
    message_of,
    pack_message,
    pack_send,
    unpack_message,
)
from tbox.bus.intake import OVERFLOW_WRAP, Intake
from tbox.bus.spec import (
    GATHER_MS_CALM,
    LINE_RATE_HZ,
    BusError,
    BusSpec,
    Pace,
    parse_bus_url,
)
from tbox.model import CAN_EFF_FLAG, CAN_ERR_FLAG, CAN_RTR_FLAG, NS_PER_MS, CanSend


@pytest.mark.parametrize(
    ("text", "interface", "channel"),
    [
        ("socketcan:vcan0", "socketcan", "vcan0"),
        ("tbox:/tmp/with:colon", "tbox", "/tmp/with:colon"),
        (" Virtual:x ", "virtual", "x"),
    ],
)
def test_a_bus_is_named_by_interface_and_channel(text: str, interface: str, channel: str) -> None:
    spec = parse_bus_url(text)
    assert (spec.interface, spec.channel, spec.fd) == (interface, channel, True)
    assert parse_bus_url(spec.name) == spec


@pytest.mark.parametrize("text", ["", "vcan0", ":", "socketcan:", ":x", "so cket:x", "a:" + "x" * 2000])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BusError) as caught:
        parse_bus_url(text)
    assert "INTERFACE:CHANNEL" in str(caught.value) and caught.value.exit_code == 2


def test_a_spec_knows_its_keys_and_bounds() -> None:
    for wrong in ({"bitrat": 1}, {"rcvbuf_bytes": 1}, {"gather_ms": 11}, {"bitrate": 0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"interface": "socketcan", "channel": "can0", **wrong}, BusSpec)


def test_backoff_doubles_to_its_limit_and_begins_anew_after_success() -> None:
    backoff, now_ns, waits_ms = Backoff(), 5, []
    for _ in range(9):
        assert backoff.wait_ns(now_ns) == 0
        backoff.failed(now_ns)
        waits_ms.append(backoff.wait_ns(now_ns) // NS_PER_MS)
        now_ns += backoff.wait_ns(now_ns)
    assert waits_ms == [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]
    assert (waits_ms[0], waits_ms[-1]) == (REOPEN_FIRST_MS, REOPEN_LIMIT_MS)
    backoff.worked()
    backoff.failed(now_ns)
    assert backoff.wait_ns(now_ns) == REOPEN_FIRST_MS * NS_PER_MS


flags = st.sampled_from([0, CAN_EFF_FLAG, CAN_RTR_FLAG, CAN_ERR_FLAG, CAN_ERR_FLAG | CAN_RTR_FLAG])
taken = st.lists(st.tuples(st.integers(0, 0x7FF), flags, st.integers(-(10**9), 10**9)), max_size=30)


@given(batches=st.lists(taken, max_size=6))
def test_every_frame_taken_is_handed_on_or_counted_and_times_stay_in_order(
    batches: list[list[tuple[int, int, int]]],
) -> None:
    intake, out, times, now_ns = Intake(2), 0, [0], 0
    for rows in batches:
        now_ns += 10**8
        frames = frames_of(FRAME.pack(number | flag, 0, 0, b"") for number, flag, _ in rows)
        intake.counters.received += len(rows)
        batch = intake.batch(frames, np.array([t for _, _, t in rows], np.int64), now_ns)
        if batch is not None:
            assert batch.channel == 2 and not (batch.frames["id"] & (CAN_ERR_FLAG | CAN_RTR_FLAG)).any()
            out += len(batch)
            times += batch.t_ns.tolist()
            assert times[-1] <= now_ns
    counters = intake.counters
    assert counters.out == out
    assert counters.into == out + sum(counters.dropped.values())
    assert times == sorted(times)


@given(steps=st.lists(st.integers(0, 2**30), max_size=20))
def test_the_drop_count_survives_its_wrap(steps: list[int]) -> None:
    intake, total = Intake(0), 0
    for step in steps:
        total += step
        intake.overflow(total % OVERFLOW_WRAP)
        intake.overflow((total - min(step, 1000)) % OVERFLOW_WRAP)  # an older one, told late
        assert intake.counters.kernel_dropped == total


def test_a_calm_reader_gathers_long_only_if_the_buffer_bears_the_highest_rate_of_a_bus() -> None:
    spec = BusSpec(interface="socketcan", channel="can0")
    usual_s, unprivileged, privileged = spec.gather_s(Pace.USUAL), 512, 20_000  # frames of SocketCAN's
    assert spec.gather_s(Pace.HURRIED) < usual_s == 0.01
    assert spec.gather_s(Pace.CALM) == spec.gather_s(Pace.CALM, unprivileged) == usual_s
    assert spec.gather_s(Pace.CALM, privileged) == GATHER_MS_CALM / 1000
    for buffer_frames in range(64, privileged, 100):
        gathered = LINE_RATE_HZ * spec.gather_s(Pace.CALM, buffer_frames)
        assert gathered <= max(buffer_frames / 3, LINE_RATE_HZ * usual_s) * 1.001


def test_a_new_socket_counts_from_zero() -> None:
    intake = Intake(0)
    intake.overflow(7)
    intake.new_socket()
    intake.overflow(2)
    assert intake.counters.kernel_dropped == 9


def test_counters_are_copied_with_what_they_hold() -> None:
    counters = Intake(0).counters
    copy = counters.copy()
    counters.error_frames["bus_off"] = 1
    counters.received = 5
    assert copy.error_frames == {} and copy.received == 0


@given(st.binary(max_size=64), st.booleans(), st.booleans())
def test_a_message_packed_and_unpacked_is_the_same(data: bytes, extended: bool, fd: bool) -> None:
    data = data if fd else data[:8]
    message = can.Message(arbitration_id=0x7A, is_extended_id=extended, is_fd=fd, data=data)
    again = unpack_message(pack_message(message))
    assert again.equals(message, timestamp_delta=None)


@given(st.binary(max_size=64))
def test_what_is_sent_is_padded_to_a_length_can_fd_has(data: bytes) -> None:
    frame = CanSend(0, 0x123 | CAN_EFF_FLAG, data)
    size = pack_send(frame)[4]
    assert size in FD_LENGTHS and size >= len(data)
    message = message_of(frame)
    assert message.is_fd and message.is_extended_id and message.data == data.ljust(size, b"\0")
