"""The link's state machine: every pair of state and event, and what must hold whatever the network does."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.model import NS_PER_MS, NS_PER_S, RECORD_PAYLOAD_BYTES_MAX, Record
from tbox.uplink.session import (
    IDLE_POLL_MS,
    TABLE,
    Action,
    Announce,
    Connect,
    Drop,
    Event,
    IllegalEvent,
    Leave,
    Send,
    Session,
    SessionSettings,
    State,
)
from tests.memory_spool import MemorySpool
from tests.tables import check_pair, check_whole, every_pair

SETTINGS = SessionSettings(
    window=5,
    backoff_base_ms=1_000,
    backoff_max_ms=120_000,
    refused_retry_s=900,
    connect_deadline_ms=10_000,
    ack_deadline_ms=5_000,
    probe_idle_ms=30_000,
    resume_probe_ms=1_000,
    stable_ms=30_000,
    leave_deadline_ms=2_000,
)


def records(n: int, size_bytes: int = 10) -> list[Record]:
    return [Record(1 << 32 | i + 1, "telemetry", 1, b"x" * size_bytes) for i in range(n)]


def a_session(
    spool: MemorySpool | None = None, jitter: Callable[[], float] = lambda: 0.5, **changes: Any
) -> Session:
    options = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__} | changes
    return Session(SessionSettings(**options), spool or MemorySpool(), jitter)


def s(seconds: float) -> int:
    return int(seconds * NS_PER_S)


def online(session: Session, at_ns: int = 0) -> list[Action]:
    session.start(at_ns)
    session.step(at_ns)
    session.connected(session.link, at_ns)
    return session.step(at_ns)[0]


def drive_to(state: State) -> Session:
    """Bring a fresh session into a state the way the world would."""
    session = a_session(MemorySpool(records(1)))
    if state is State.STOPPED:
        return session
    session.start(0)
    if state is State.WAITING:
        session.lost(session.link, 0, "no route")
    elif state is State.REFUSED:
        session.denied(session.link, 0, "bad password")
    elif state is not State.CONNECTING:
        session.connected(session.link, 0)
        session.step(0)
        if state in (State.DRAINING, State.LEAVING):
            session.stop(0)
        if state is State.LEAVING:
            session.hurry(0)
    assert session.state is state
    return session


@every_pair(State, Event)
def test_every_pair_of_state_and_event_is_in_the_table_or_raises(state: State, event: Event) -> None:
    session = drive_to(state)

    def fire(_: State, event: Event) -> State:
        session._fire(event, 0)
        return session.state

    check_pair(TABLE, state, event, fire, IllegalEvent)
    assert session.state is TABLE.get((state, event), state)


def test_every_state_is_reached_and_left() -> None:
    check_whole(TABLE, State, Event)


def test_a_connected_session_says_online_first_and_then_fills_the_window_and_no_more() -> None:
    spool = MemorySpool(records(20))
    actions = online(a_session(spool))
    assert isinstance(actions[0], Announce) and actions[0].state == "online"
    assert len(actions) == SETTINGS.window
    assert all(isinstance(action, Send) for action in actions[1:])


def test_a_record_leaves_the_spool_only_after_its_puback() -> None:
    spool = MemorySpool(records(3))
    session = a_session(spool)
    sends = [action for action in online(session) if isinstance(action, Send)]
    assert spool.acked == []
    session.acked(session.link, [sends[1].token], 1)
    assert spool.acked == [sends[1].record.id]


def test_the_brokers_smaller_window_is_respected_with_one_place_left_for_the_state() -> None:
    spool = MemorySpool(records(20))
    session = a_session(spool)
    session.start(0)
    session.connected(session.link, 0, window_granted=3)
    session.step(0)
    assert session.in_flight + 1 == 2  # the state message and one record


def test_the_window_is_bounded_in_bytes_too() -> None:
    spool = MemorySpool(records(20, RECORD_PAYLOAD_BYTES_MAX))
    session = a_session(spool, window=20, window_bytes=4 * RECORD_PAYLOAD_BYTES_MAX)
    online(session)
    assert len(spool.in_flight) == 4


def test_what_is_in_flight_when_the_link_dies_goes_back_and_late_pubacks_do_not_count() -> None:
    spool = MemorySpool(records(3))
    session = a_session(spool)
    online(session)
    old = session.link
    session.lost(old, s(1), "reset")
    assert spool.requeues == 1 and len(spool.waiting) == 3 and session.in_flight == 0
    session.acked(old, [1 << 32 | 1], s(1))
    assert spool.acked == [] and session.counters.stale_reports == 1


def test_a_link_that_is_connected_but_silent_is_given_up_after_the_ack_deadline() -> None:
    spool = MemorySpool(records(3))
    session = a_session(spool)
    online(session)
    assert session.step(s(4.9))[0] == []
    actions, _ = session.step(s(5))
    assert session.state is State.WAITING and "stalled" in session.why
    assert Drop(1) in actions and len(spool.waiting) == 3


def test_slow_progress_is_not_a_stall_but_one_puback_that_never_comes_is() -> None:
    session = a_session(MemorySpool(records(1000)))
    online(session)
    now = 0.0
    while session.state is State.ONLINE:
        now += 4.0
        newest = max(session._in_flight)
        session.acked(session.link, [newest], s(now))
        session.step(s(now))
        assert now < 60
    assert now == pytest.approx(20, abs=4)


def test_an_idle_link_is_probed_with_the_state_message_and_given_up_when_it_is_dead() -> None:
    session = a_session()
    first = online(session)[0]
    assert isinstance(first, Announce)
    session.acked(session.link, [first.token], 0)
    actions, _ = session.step(s(30))
    assert [type(action) for action in actions] == [Announce]
    session.step(s(35))
    assert session.state is State.WAITING


def test_backoff_doubles_up_to_its_limit_with_full_jitter() -> None:
    waits = []
    session = a_session(jitter=lambda: 0.999999)
    session.start(0)
    now = 0
    for _ in range(10):
        session.lost(session.link, now, "refused")
        waits.append((session._wake_ns - now) / NS_PER_S)
        now = session._wake_ns
        session.step(now)
    assert waits == pytest.approx([1, 2, 4, 8, 16, 32, 64, 120, 120, 120], rel=1e-3)
    eager = a_session(jitter=lambda: 0.0)
    eager.start(0)
    eager.lost(eager.link, 0, "refused")
    assert eager._wake_ns == 0


def test_backoff_starts_anew_only_after_a_link_that_lasted() -> None:
    session = a_session(jitter=lambda: 0.999999)
    session.start(0)
    now = 0
    for _ in range(5):
        session.lost(session.link, now, "refused")
        now = session._wake_ns
        session.step(now)
    session.connected(session.link, now)
    session.lost(session.link, now + s(1), "reset at once")
    assert session._wake_ns - now > s(20)
    now = session._wake_ns
    session.step(now)
    session.connected(session.link, now)
    now += s(31)
    session.lost(session.link, now, "reset after a while")
    assert session._wake_ns - now <= s(1)


def test_a_refused_login_stops_the_attempts_says_so_and_tries_again_slowly() -> None:
    session = a_session()
    session.start(0)
    session.step(0)
    session.denied(session.link, 0, "Not authorized")
    actions, wake = session.step(0)
    assert session.state is State.REFUSED and session.status()["why"] == "Not authorized"
    assert wake == s(900) and Connect not in map(type, actions)
    session.nudge(s(10))
    assert session.state is State.REFUSED and session.step(s(10))[1] == s(900)
    actions, _ = session.step(s(900))
    assert [type(action) for action in actions] == [Connect]


def test_after_a_suspend_a_dead_link_is_found_and_replaced_within_two_seconds() -> None:
    spool = MemorySpool(records(3))
    session = a_session(spool, jitter=lambda: 0.99)
    online(session)
    session.acked(session.link, list(session._in_flight), 0)
    resumed = s(3600)
    session.nudge(resumed)
    now = resumed
    while not any(isinstance(action, Connect) for action in session.step(now)[0]):
        now += 10 * NS_PER_MS
    assert now - resumed <= s(2)


def test_a_nudge_while_waiting_connects_at_once_but_not_again_and_again() -> None:
    session = a_session(jitter=lambda: 0.999)
    session.start(0)
    session.lost(session.link, 0, "no route")
    session.nudge(0)
    assert session.state is State.CONNECTING and session.counters.links == 2
    for ms in range(1, 900, 100):
        session.nudge(ms * NS_PER_MS)
    assert session.counters.links == 2


def test_stopping_sends_what_is_left_says_offline_and_leaves_politely() -> None:
    spool = MemorySpool(records(12))
    session = a_session(spool)
    pending = online(session)
    session.stop(0)
    seen: list[Action] = []
    while session.state is not State.STOPPED:
        session.acked(session.link, [a.token for a in pending if isinstance(a, Send | Announce)], 1)
        pending = session.step(1)[0]
        seen += pending
    assert len(spool.acked) == 12 and session.drained
    assert [a.state for a in seen if isinstance(a, Announce)] == ["offline"]
    assert isinstance(seen[-1], Leave)


def test_a_stop_in_a_hurry_leaves_the_rest_to_the_next_start() -> None:
    spool = MemorySpool(records(3))
    session = a_session(spool)
    online(session)
    session.stop(0)
    session.hurry(0)
    offline = next(a for a in session.step(0)[0] if isinstance(a, Announce))
    session.acked(session.link, [offline.token], 1)
    assert session.state is State.STOPPED and not session.drained
    assert len(spool.waiting) == 3


@pytest.mark.parametrize("state", [state for state in State if state is not State.STOPPED])
def test_a_stop_ends_from_every_state_even_if_nothing_answers(state: State) -> None:
    session = drive_to(state)
    session.stop(0)
    now: int | None = 0
    turns = 0
    while now is not None:
        if turns == 3:
            session.hurry(now)
        _, now = session.step(now)
        turns += 1
        assert turns < 1000
    assert session.state is State.STOPPED and session.in_flight == 0


REPORTS = st.sampled_from(["connect", "deny", "lose", "ack one", "ack all", "stale", "nudge", "wait", "more"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(REPORTS, st.integers(0, 40_000)), max_size=60),
    st.integers(0, 2**32),
    st.integers(1, 8),
)
def test_whatever_happens_the_books_balance_and_the_window_holds(
    story: list[tuple[str, int]], seed: int, window: int
) -> None:
    spool = MemorySpool(records(30))
    session = a_session(spool, random.Random(seed).random, window=window)
    session.start(0)
    now = 0
    delivered: set[int] = set()
    for what, wait_ms in story:
        now += wait_ms * NS_PER_MS
        linked = session.state in (State.CONNECTING, State.ONLINE)
        flying = list(session._in_flight)
        if what == "connect" and session.state is State.CONNECTING:
            session.connected(session.link, now)
        elif what == "deny" and linked:
            session.denied(session.link, now, "no")
        elif what == "lose" and linked:
            session.lost(session.link, now, "gone")
        elif what in ("ack one", "ack all") and flying:
            tokens = flying if what == "ack all" else flying[:1]
            delivered |= {token for token in tokens if token > 0}
            session.acked(session.link, tokens, now)
        elif what == "stale":
            session.acked(session.link - 1, flying, now)
        elif what == "nudge":
            session.nudge(now)
        elif what == "more":
            spool.waiting.append(Record(2 << 32 | len(spool.offered) + wait_ms + 1, "event", 1, b""))
        actions, wake = session.step(now)
        assert wake is not None
        counters = session.counters
        assert counters.offered == counters.acked + counters.requeued + session.in_flight
        assert len(session._in_flight) <= window
        assert set(spool.in_flight) == {token for token in session._in_flight if token > 0}
        assert all(action.link == session.link for action in actions if isinstance(action, Send | Connect))
    assert set(spool.acked) == delivered


def test_a_port_with_nothing_left_is_asked_again_when_it_speaks_up_and_now_and_then() -> None:
    class Telling(MemorySpool):
        asked = 0

        @property
        def more(self) -> bool:  # type: ignore[override]
            return bool(self.waiting)

        def offer(self, room: int) -> list[Record]:
            self.asked += 1
            return super().offer(room)

    first, second, third = records(3)
    spool = Telling([first])
    session = a_session(spool)
    online(session)
    assert (spool.asked, spool.offered) == (1, [first.id])
    session.acked(session.link, list(session._in_flight), s(0.1))
    actions, wake = session.step(s(0.2))  # neither an acknowledgement nor the time of a poll is a reason
    assert (actions, wake, spool.asked) == ([], s(IDLE_POLL_MS / 1000), 1)
    spool.waiting.append(second)
    session.look()
    session.step(s(0.3))
    assert spool.offered == [first.id, second.id]
    spool.waiting.append(third)  # and says nothing
    _, wake = session.step(s(0.4))
    assert wake is not None and spool.asked == 2
    session.step(wake)
    assert spool.offered == [first.id, second.id, third.id]
    session.lost(session.link, wake, "gone")
    again_ns = session._wake_ns
    session.step(again_ns)
    session.connected(session.link, again_ns)
    session.step(again_ns)
    assert again_ns < wake + s(IDLE_POLL_MS / 1000), "a new link asks at once"
    assert spool.offered[3:] == [second.id, third.id]


def test_a_port_that_holds_records_back_is_asked_at_every_poll() -> None:
    class Throttled(MemorySpool):
        asked = 0

        def offer(self, room: int) -> list[Record]:
            self.asked += 1
            return []

    spool = Throttled()
    session = a_session(spool)
    online(session)
    _, wake = session.step(s(1))
    assert wake == s(1) + SETTINGS.poll_ms * NS_PER_MS and spool.asked == 2
    session.step(wake)
    assert spool.asked == 3


def test_an_offer_beyond_the_room_is_a_bug_that_is_seen() -> None:
    class Generous(MemorySpool):
        def offer(self, room: int) -> list[Record]:
            return super().offer(room + 1)

    with pytest.raises(AssertionError):
        online(a_session(Generous(records(20))))
