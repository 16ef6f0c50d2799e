"""The bus threads: calm frames wait for each other, a frame that presses does not, and none is lost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import can
import pytest

from tbox import flow
from tbox.bus.local import LocalBus
from tbox.bus.reader import open_reader, parse_bus_url
from tbox.bus.spec import Pace
from tbox.flow import HOLD_FRAMES_MAX, BusThread
from tbox.health import Heart
from tbox.model import FrameBatch

PRESSING = 7
FOREVER_S = 600.0
DEADLINE_S = 30.0

Inbox = queue.Queue[Any]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves because of time alone."""
    monkeypatch.setattr(flow, "HOLD_S", FOREVER_S)


@pytest.fixture
def inbox() -> Inbox:
    return queue.Queue()


@pytest.fixture
def hurry() -> threading.Event:
    return threading.Event()


@pytest.fixture
def thread(tmp_path: Path, inbox: Inbox, hurry: threading.Event) -> Iterator[BusThread]:
    reader = open_reader(parse_bus_url(f"tbox:{tmp_path}"), 0)
    one = BusThread(reader, inbox, lambda batch: PRESSING in ids(batch), hurry.is_set, Heart("can-rx-0"))
    one.start()
    yield one
    one.stop()
    assert one.failure is None


@pytest.fixture
def send(tmp_path: Path, thread: BusThread) -> Iterator[Callable[..., None]]:
    with LocalBus(str(tmp_path)) as bus:

        def send(*can_ids: int) -> None:
            """Return once the reader has them."""
            before = thread.reader.counters().received
            for can_id in can_ids:
                bus.send(can.Message(arbitration_id=can_id, is_extended_id=False))
            until_s = time.monotonic() + DEADLINE_S
            while thread.reader.counters().received < before + len(can_ids):
                assert time.monotonic() < until_s
                time.sleep(0.005)

        yield send


def ids(batch: FrameBatch) -> list[int]:
    found: list[int] = batch.frames["id"].tolist()
    return found


def test_calm_frames_wait_for_each_other_and_leave_together_at_stop(
    thread: BusThread, inbox: Inbox, send: Callable[..., None]
) -> None:
    for can_id in (1, 2, 3):
        send(can_id)
    thread.stop()
    batch = inbox.get(timeout=DEADLINE_S)
    assert ids(batch) == [1, 2, 3] and inbox.empty()
    assert (batch.t_ns[1:] >= batch.t_ns[:-1]).all()


def test_a_frame_that_presses_goes_at_once_behind_what_was_held(
    inbox: Inbox, send: Callable[..., None]
) -> None:
    send(1, 2)
    send(PRESSING)
    assert [ids(inbox.get(timeout=DEADLINE_S)) for _ in range(2)] == [[1, 2], [PRESSING]]


def test_only_so_many_frames_are_held(inbox: Inbox, send: Callable[..., None]) -> None:
    send(*[1] * HOLD_FRAMES_MAX)
    assert len(inbox.get(timeout=DEADLINE_S)) >= HOLD_FRAMES_MAX


def test_the_reader_gathers_long_while_nothing_presses_and_shortly_while_time_is_short(
    thread: BusThread, hurry: threading.Event, send: Callable[..., None]
) -> None:
    paces = [thread.reader.pace]  # it waits for its first frame
    send(1)
    send(1)
    paces.append(thread.reader.pace)  # something is held: the rest must come before it is due
    hurry.set()
    send(1, 1)
    paces.append(thread.reader.pace)
    assert paces == [Pace.CALM, Pace.USUAL, Pace.HURRIED]
