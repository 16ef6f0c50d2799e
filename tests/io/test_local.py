"""The bus between processes: order of starting, kills, slow members, limits. Real pipes, real processes."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import can
import pytest

from tbox.bus import local
from tbox.bus.frames import FRAME
from tbox.bus.local import LocalBus
from tbox.bus.spec import LINE_RATE_HZ

DEADLINE_S = 30.0


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[..., LocalBus]]:
    with ExitStack() as stack:

        def open_member(**options: object) -> LocalBus:
            bus = can.Bus(interface="tbox", channel=str(tmp_path / "bus"), ignore_config=True, **options)  # type: ignore[arg-type]
            assert isinstance(bus, LocalBus)
            return stack.enter_context(bus)

        yield open_member


def frame(number: int, size: int = 64) -> can.Message:
    return can.Message(
        arbitration_id=number % 0x800, data=number.to_bytes(8, "big").ljust(size, b"\0"), is_fd=True,
        is_extended_id=False, bitrate_switch=True,
    )  # fmt: skip


def number_of(message: can.Message | None) -> int:
    assert message is not None, "no frame came"
    return int.from_bytes(message.data[:8], "big")


def member(tmp_path: Path, code: str) -> subprocess.Popen[str]:
    """Start another process on the bus: `bus` is open in it, and it has said so."""
    head = f"import can, sys, time\nbus = can.Bus(interface='tbox', channel={str(tmp_path / 'bus')!r})\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + "print('open', flush=True)\n" + textwrap.dedent(code)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until_s, "it never came true"
        time.sleep(0.01)


def test_a_frame_reaches_every_other_member_but_not_its_sender(join: Callable[..., LocalBus]) -> None:
    a, b, c = join(), join(), join()
    b.send(frame(7))
    assert [number_of(a.recv(DEADLINE_S)), number_of(c.recv(DEADLINE_S))] == [7, 7]
    assert b.recv(0) is None


def test_every_kind_of_frame_arrives_as_it_was_sent(join: Callable[..., LocalBus]) -> None:
    a, b = join(), join()
    sent = [
        can.Message(arbitration_id=0x1ABCDEF0, data=b"\1\2\3"),
        can.Message(arbitration_id=0x123, is_extended_id=False),
        can.Message(arbitration_id=0x321, is_extended_id=False, is_remote_frame=True, dlc=5),
        can.Message(arbitration_id=0x44, is_extended_id=False, is_error_frame=True, data=bytes(8)),
        can.Message(arbitration_id=5, is_fd=True, data=bytes(range(64)), error_state_indicator=True),
        frame(9, 12),
    ]
    for message in sent:
        a.send(message)
    for message in sent:
        got = b.recv(DEADLINE_S)
        assert got is not None and got.equals(message, timestamp_delta=None, check_channel=False)
        assert abs(got.timestamp - time.time()) < DEADLINE_S


def test_own_messages_come_back_only_when_asked_for(join: Callable[..., LocalBus]) -> None:
    a, b = join(receive_own_messages=True), join()
    a.send(frame(1))
    own = a.recv(DEADLINE_S)
    assert number_of(own) == 1 and own is not None and not own.is_rx
    assert number_of(b.recv(DEADLINE_S)) == 1


def test_filters_of_python_can_work(join: Callable[..., LocalBus]) -> None:
    a, b = join(), join(can_filters=[{"can_id": 2, "can_mask": 0x7FF}])
    for number in (1, 2, 3):
        a.send(frame(number))
    assert number_of(b.recv(DEADLINE_S)) == 2 and b.recv(0) is None


def test_a_member_that_only_writes_is_never_sent_to(join: Callable[..., LocalBus]) -> None:
    writers = join(receive=False), join(receive=False)
    reader = join(send_wait_s=0.0)
    last = join(receive=False)
    for number in range(2000):  # far more than an inbox holds
        reader.send(frame(number))
        writers[0].send(frame(number))
        wait_for(lambda: reader.recv(0) is not None)
    assert reader.dropped_out == writers[0].dropped_out == last.dropped_out == reader.dropped_in == 0


def test_an_fd_frame_is_refused_on_a_classic_bus(join: Callable[..., LocalBus]) -> None:
    with pytest.raises(can.CanOperationError, match="fd=False"):
        join(fd=False).send(frame(1))


def test_the_number_of_members_is_limited(
    join: Callable[..., LocalBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MEMBERS_MAX", 3)
    members = [join() for _ in range(3)]
    with pytest.raises(can.CanInitializationError, match="3 members are its limit"):
        join()
    members[1].shutdown()
    join()


def test_a_channel_that_cannot_be_a_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(can.CanInitializationError, match="a directory of its own"):
        LocalBus(str(tmp_path / "file"))


def test_a_directory_with_a_very_long_name_is_fine(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    with LocalBus(str(deep)) as a, LocalBus(str(deep)) as b:
        a.send(frame(3))
        assert number_of(b.recv(DEADLINE_S)) == 3


def test_an_inbox_is_pollable_and_nobody_else_may_read_it(join: Callable[..., LocalBus]) -> None:
    before = os.umask(0o022)
    try:
        a, b, mute = join(), join(), join(receive=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(a._own.stat().st_mode) == 0o600
    ready = select.poll()
    for bus in (a, mute):
        ready.register(bus.fileno(), select.POLLIN)
    assert ready.poll(0) == []
    b.send(frame(1))
    assert ready.poll(DEADLINE_S * 1000) == [(a.fileno(), select.POLLIN)]
    b.shutdown()  # the last sender goes: no end of file
    assert number_of(a.recv(DEADLINE_S)) == 1 and ready.poll(0) == [] and a.recv(0) is None


def test_an_inbox_holds_two_fifths_of_a_second_of_a_full_bus(join: Callable[..., LocalBus]) -> None:
    sender, reader = join(send_wait_s=0.0), join()
    while not sender.dropped_out:
        sender.send(frame(1))
    held = 0
    while reader.recv(0) is not None:
        held += 1
    assert held >= 0.4 * LINE_RATE_HZ
    assert 0.95 * reader.buffer_bytes / local.RECORD.size < held <= reader.buffer_bytes / local.RECORD.size


def test_without_privilege_an_inbox_is_as_large_as_the_kernel_grants(monkeypatch: pytest.MonkeyPatch) -> None:
    granted = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    monkeypatch.setattr(local, "INBOX_BYTES", 4 * granted)
    with unprivileged():
        fd, other = os.pipe()
        try:
            assert local._widen(fd) == granted
        finally:
            os.close(fd)
            os.close(other)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Do without root's rights for a while, if we have them."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_process_of_an_earlier_release_is_not_misread_but_named(
    join: Callable[..., LocalBus], tmp_path: Path
) -> None:
    (tmp_path / "bus").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / "bus" / f"{gone.pid}-0123456789ab.v1.sock").touch()
    join()  # what a killed one left is no hindrance
    (tmp_path / "bus" / f"{os.getpid()}-0123456789ab.v1.sock").touch()
    with pytest.raises(can.CanInitializationError, match=f"process {os.getpid()} is of an earlier release"):
        join()


def test_a_closed_bus_refuses_and_may_be_closed_again(join: Callable[..., LocalBus]) -> None:
    bus = join()
    bus.shutdown()
    bus.shutdown()
    with pytest.raises(can.CanOperationError):
        bus.send(frame(1))
    with pytest.raises(can.CanOperationError):
        bus.recv(0)


@pytest.fixture
def small_inboxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inboxes that are soon full."""
    monkeypatch.setattr(local, "INBOX_BYTES", 64 * 1024)


@pytest.mark.usefixtures("small_inboxes")
def test_a_member_that_stops_reading_costs_one_wait_and_the_rest_is_counted_on_both_sides(
    join: Callable[..., LocalBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    room = local._room

    def counted(fd: int, timeout_s: float) -> bool:
        waits.append(timeout_s)
        return room(fd, timeout_s)

    monkeypatch.setattr(local, "_room", counted)
    sender, slow, prompt = join(send_wait_s=0.2), join(), join()
    total = 3000
    got_prompt = 0
    for number in range(total):
        sender.send(frame(number))
        while prompt.recv(0) is not None:
            got_prompt += 1
    wait_for(lambda: prompt.recv(0) is None)
    assert got_prompt == total and prompt.dropped_in == 0
    assert sender.dropped_out > 0 and len(waits) == 1
    held = 0
    while slow.recv(0) is not None:
        held += 1
    assert held == total - sender.dropped_out
    sender.send(frame(total))  # it reads again, so it gets this one, and sees the gap before it
    assert number_of(slow.recv(DEADLINE_S)) == total
    assert slow.dropped_in == sender.dropped_out


@pytest.mark.usefixtures("small_inboxes")
def test_what_several_senders_could_not_give_is_counted_to_the_last_frame(
    join: Callable[..., LocalBus],
) -> None:
    reader, senders = join(), [join(send_wait_s=0.0, receive=False) for _ in range(3)]
    offered = taken = 0
    for turn in range(4):
        for number in range(500):
            for sender in senders:
                sender.send(frame(number))
                offered += 1
            taken += turn == 2 and reader.recv(0) is not None  # it reads, but too slowly
        while reader.recv(0) is not None:
            taken += 1
    for sender in senders:
        sender.send(frame(0))
        assert number_of(reader.recv(DEADLINE_S)) == 0
    assert all(sender.dropped_out for sender in senders)
    assert reader.dropped_in == sum(sender.dropped_out for sender in senders) == offered - taken
    assert reader.malformed == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small_inboxes")
def test_a_slow_reader_makes_the_sender_wait_and_loses_nothing(
    join: Callable[..., LocalBus], tmp_path: Path
) -> None:
    sender = join()
    reader = member(tmp_path, """
        n = 0
        while n < 5000:
            assert int.from_bytes(bus.recv(30).data[:8], 'big') == n
            n += 1
            if n % 500 == 0:
                time.sleep(0.05)
        print(n, bus.dropped_in, flush=True)
    """)  # fmt: skip
    for number in range(5000):
        sender.send(frame(number), timeout=DEADLINE_S)
    assert reader.communicate(timeout=DEADLINE_S)[0] == "5000 0\n"
    assert sender.dropped_out == 0


def test_a_joiner_gets_every_frame_sent_after_it_joined(join: Callable[..., LocalBus]) -> None:
    sender = join()
    for number in range(20):
        joiner = join()
        sender.send(frame(number))
        assert number_of(joiner.recv(DEADLINE_S)) == number
        joiner.shutdown()


@pytest.mark.parametrize("victim", ["reader", "sender"])
def test_killing_a_member_takes_nothing_from_the_others(
    join: Callable[..., LocalBus], tmp_path: Path, victim: str
) -> None:
    a = join()
    loop = "while True: bus.recv(1)" if victim == "reader" else """
        for n in range(1 << 40):
            time.sleep(0.0005)
            bus.send(can.Message(arbitration_id=1, is_extended_id=False, data=n.to_bytes(8, 'big')))
    """  # fmt: skip
    other = member(tmp_path, loop)
    b = join()
    before = [number_of(a.recv(DEADLINE_S)) for _ in range(50)] if victim == "sender" else []
    assert before == list(range(len(before)))
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    wait_for(lambda: a.recv(0) is None and b.recv(0) is None)
    for number in range(100):
        a.send(frame(number))
        assert number_of(b.recv(DEADLINE_S)) == number
    assert (a.dropped_out, b.dropped_in, a.dropped_in) == (0, 0, 0)
    stale = [path for path in (tmp_path / "bus").iterdir() if path.name.startswith(f"{other.pid}-")]
    assert len(stale) == 1, "a killed process leaves its inbox"
    late = join()
    a.send(frame(1))
    assert number_of(late.recv(DEADLINE_S)) == 1
    assert not stale[0].exists(), "and the next joiner clears it away"


def test_killing_a_sender_amid_its_writes_leaves_no_half_record(
    join: Callable[..., LocalBus], tmp_path: Path
) -> None:
    reader = join()
    for _ in range(5):
        flood = member(tmp_path, """
            for n in range(1 << 40):
                bus.send(can.Message(arbitration_id=1, is_extended_id=False, data=n.to_bytes(8, 'big')))
        """)  # fmt: skip
        got = [number_of(reader.recv(DEADLINE_S)) for _ in range(3000)]
        os.kill(flood.pid, signal.SIGKILL)
        flood.wait()
        while (last := reader.recv(0)) is not None:
            got.append(number_of(last))
        assert got == list(range(len(got)))
    assert (reader.malformed, reader.dropped_in) == (0, 0)
    late = join(receive=False)
    late.send(frame(5))
    assert number_of(reader.recv(DEADLINE_S)) == 5


def test_a_joiner_that_died_half_way_is_cleared_away_and_nobody_waits_for_it(
    join: Callable[..., LocalBus], tmp_path: Path
) -> None:
    a = join()
    half = tmp_path / "bus" / f"1-0123456789ab{local.MEMBER_SUFFIX}"
    os.mkfifo(half)  # nobody reads it yet, nor will
    a.send(frame(0))
    assert a.unheard == 1
    b = join()
    assert not half.exists()
    a.send(frame(1))
    assert number_of(b.recv(DEADLINE_S)) == 1 and a.dropped_out == 0


@pytest.mark.slow
def test_processes_may_start_in_any_order_and_all_hear_each_other(tmp_path: Path) -> None:
    code = """
        mine = int(sys.stdin.readline())
        # Each says its number until it has heard all others.
        heard = {mine}
        while len(heard) < 4:
            bus.send(can.Message(arbitration_id=mine, is_extended_id=False))
            got = bus.recv(0.05)
            while got is not None:
                heard.add(got.arbitration_id)
                got = bus.recv(0)
        for _ in range(20):
            bus.send(can.Message(arbitration_id=mine, is_extended_id=False)); time.sleep(0.01)
        print(sorted(heard), flush=True)
    """
    head = f"import can, sys, time\nbus = can.Bus(interface='tbox', channel={str(tmp_path / 'bus')!r})\n"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(code)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
    assert [process.communicate(timeout=DEADLINE_S)[0] for process in processes] == ["[0, 1, 2, 3]\n"] * 4


def test_nonsense_from_another_program_is_counted_and_takes_no_frame_with_it(
    join: Callable[..., LocalBus],
) -> None:
    a, b = join(), join()
    stranger = os.open(a._own, os.O_WRONLY)
    total = 2 * local.READ_RECORDS_MAX  # so that reads end amid a record
    for number in range(total):
        b.send(frame(number))
        os.write(stranger, b"GET / HTTP/1.1\r\n"[: number % 17])
    os.close(stranger)
    assert [number_of(a.recv(DEADLINE_S)) for _ in range(total)] == list(range(total))
    assert a.recv(0) is None
    nonsense = sum(1 for number in range(total) if number % 17)
    assert nonsense <= a.malformed <= nonsense + 3  # what a read cuts in two counts twice
    assert a.dropped_in == 0


def test_a_record_that_holds_no_frame_is_counted_and_left_out(join: Callable[..., LocalBus]) -> None:
    a, b = join(), join()
    for length in (64, 65, 255, 0):
        b.send_packed(FRAME.pack(length, length, 0, b""))
    got = a.recv_frames(DEADLINE_S)
    assert got is not None and got[0]["id"].tolist() == [64, 0] and a.malformed == 2
