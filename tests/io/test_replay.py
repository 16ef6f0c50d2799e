"""`tbox replay` as a user runs it: pace, loops, channels, what it prints and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import can
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.bus.local import LocalBus
from tbox.cli.replay import Pace

DEADLINE_S = 60.0
LOG = """\
(10.0) can0 101#01
(10.1) can1 201#02
rubbish
(10.2) can0 102##10304
(10.3) can0 103#R
(10.3) can0 104#
"""


def tbox(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from tbox.cli.main import main; main()", "replay", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> str:
    (tmp_path / "x.log").write_text(LOG)
    return str(tmp_path / "x.log")


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[LocalBus]:
    with LocalBus(str(tmp_path / "bus")) as bus:
        yield bus


def received(bus: LocalBus) -> list[can.Message]:
    return list(iter(lambda: bus.recv(0), None))


@pytest.mark.slow
def test_every_data_frame_is_written_and_counted_in_one_line(log: str, bus: LocalBus) -> None:
    done = tbox(log, "--bus", bus.channel_info, "--speed", "max")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert (said["frames"], said["skipped"], said["damaged"]) == (4, 1, 1)
    assert "line 3" in done.stderr
    assert [(m.arbitration_id, m.is_fd, bytes(m.data)) for m in received(bus)] == [
        (0x101, False, b"\1"), (0x201, False, b"\2"), (0x102, True, b"\3\4"), (0x104, False, b"")
    ]  # fmt: skip


def test_one_channel_may_be_played_several_times(log: str, bus: LocalBus) -> None:
    done = tbox(log, "--bus", bus.channel_info, "--speed", "1000", "--channel", "1", "--loop", "3")
    assert json.loads(done.stdout)["frames"] == 3
    assert [m.arbitration_id for m in received(bus)] == [0x201] * 3


@pytest.mark.slow
def test_the_recorded_pace_is_kept_or_scaled(log: str, bus: LocalBus) -> None:
    times: list[float] = []

    def listen() -> None:
        while len(times) < 4:
            message = bus.recv(DEADLINE_S)
            assert message is not None
            times.append(message.timestamp)

    thread = threading.Thread(target=listen)
    thread.start()
    done = tbox(log, "--bus", bus.channel_info, "--speed", "0.5")
    thread.join(DEADLINE_S)
    # 0.3 s at half speed; a loaded machine may be late, but never early.
    assert times[-1] - times[0] >= 0.55 and json.loads(done.stdout)["seconds"] >= 0.55


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--channel", "7"], "no frame on channel 7; channels are 0 (can0), 1 (can1)"),
        (["--speed", "0"], "max"),
        (["--loop", "0"], "--loop"),
        (["--bus", "vcan0"], "INTERFACE:CHANNEL"),
        (["--bus", "soketcan:vcan0"], "interfaces are"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(log: str, arguments: list[str], words: str) -> None:
    done = tbox(log, "--bus", "virtual:x", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_a_bus_without_a_listener_is_said_aloud(log: str, tmp_path: Path) -> None:
    done = tbox(log, "--bus", f"tbox:{tmp_path / 'bus'}", "--speed", "max")
    assert json.loads(done.stdout)["frames"] == 4 and "nobody is on" in done.stderr


@given(
    times=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=30),
    speed=st.one_of(st.none(), st.floats(0.01, 1000)),
)
def test_frames_are_never_due_out_of_order(times: list[float | None], speed: float | None) -> None:
    pace = Pace(speed, 100.0)
    due = [pace.due_s(t) for t in times]
    assert due == sorted(due) and due[0] == 100.0
    if speed is None:
        assert set(due) == {100.0}
