"""What the spool decides: id ranges, token bucket, drain order, eviction, which clock may expire."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tbox.model import NS_PER_MS, NS_PER_S, Level, Now, Record, TimeQuality, record_id
from tbox.spool.ballast import STEP_BYTES, size_for
from tbox.spool.drain import Drain, TokenBucket
from tbox.spool.flash import StartRow
from tbox.spool.policy import (
    CLOCK_SETTLE_S,
    ROUTINE,
    Dropped,
    IdRanges,
    Lane,
    SettledClock,
    StoredRun,
    packed,
    pick_expired,
    pick_oldest,
    ranges_of,
    unpacked,
)
from tbox.spool.ram import RUN_BYTES_MAX, RamQueue, runs_of
from tbox.spool.starts import previous_start

WALL_NS = 1_800_000_000 * NS_PER_S


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8))))
def test_id_ranges_are_a_set_of_ids(spans: list[tuple[int, int]]) -> None:
    ranges, ids = IdRanges(), set[int]()
    for first, extra in spans:
        ranges.add(first, first + extra)
        ids |= set(range(first, first + extra + 1))
    assert {one for first, last in ranges for one in range(first, last + 1)} == ids
    assert len(ranges) == len(ids)
    assert all((one in ranges) == (one in ids) for one in range(-1, 75))
    edges = list(ranges)
    assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(edges))  # no two ranges touch


@given(st.sets(st.integers(1, 60)), st.integers(1, 60), st.integers(0, 20))
def test_what_is_within_a_range_and_what_is_not_add_up_to_it(ids: set[int], first: int, extra: int) -> None:
    ranges, last = IdRanges(ids), first + extra
    inside = {one for a, b in ranges.within(first, last) for one in range(a, b + 1)}
    outside = {one for a, b in ranges.without(first, last) for one in range(a, b + 1)}
    assert inside == {one for one in ids if first <= one <= last}
    assert inside | outside == set(range(first, last + 1)) and not inside & outside
    assert list(unpacked(packed(ranges, 1), 1)) == list(ranges) == list(ranges_of(sorted(ids)))


@given(st.sets(st.integers(1, 300)), st.integers(0, 12_000))
def test_a_run_is_records_that_follow_one_another_up_to_its_limit(ids: set[int], size: int) -> None:
    records = [Record(one, "telemetry", 1 + (one > 200), bytes(size)) for one in sorted(ids)]
    runs = list(runs_of(records))
    assert [record for run in runs for record in run.records] == records
    for run in runs:
        assert [record.id for record in run.records] == list(range(run.first, run.last + 1))
        assert len({record.level for record in run.records}) == 1
        assert run.size_bytes == sum(len(record.payload) for record in run.records)
        assert len(run.records) == 1 or run.size_bytes <= RUN_BYTES_MAX


_does = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 7), st.sampled_from([0, 5, 9000]), st.integers(0, 1)),
    st.tuples(st.just("remove"), st.integers(1, 80), st.integers(0, 9)),
    st.tuples(st.just("take"), st.integers(-1, 9), st.sampled_from([-1, 1, 11, 20_000, 1 << 20])),
    st.tuples(st.just("put back"), st.integers(1, 80)),
    st.tuples(st.just("append late"), st.integers(1, 80)),
)


@given(st.lists(_does, max_size=40))
def test_a_queue_in_ram_is_a_sorted_list_of_records(does: list[tuple[Any, ...]]) -> None:
    queue, held, out, newest = RamQueue(), dict[int, Record](), dict[int, Record](), 0
    for what, *numbers in does:
        if what == "append":
            n, size, gap = numbers
            level = Level.WARNING if size else Level.INFO
            more = [Record(newest + gap + one, "telemetry", level, bytes(size)) for one in range(1, n + 1)]
            newest = more[-1].id
            held |= {record.id: record for record in more}
            for run in runs_of(more):
                queue.append(run)
        elif what == "remove":
            first, last = numbers[0], sum(numbers)
            removed = [record for run in queue.remove(first, last) for record in run.records]
            assert removed == [record for one, record in held.items() if first <= one <= last]
            assert queue.count(first, last) == 0 and queue.get(first) is None
            out |= {record.id: held.pop(record.id) for record in removed}
        elif what == "take":
            records_max, bytes_max = numbers
            taken = queue.take(records_max, bytes_max)
            assert taken == list(held.values())[: len(taken)] and len(taken) <= max(0, records_max)
            assert sum(len(record.payload) for record in taken[:-1]) < max(1, bytes_max)
            enough = len(taken) >= records_max or sum(len(one.payload) for one in taken) >= bytes_max
            assert enough or len(taken) == len(held)
            out |= {record.id: held.pop(record.id) for record in taken}
        else:
            back = [out.pop(one) for one in list(out) if one <= numbers[0]]
            if what == "put back":
                queue.put_back(back)
            else:
                for run in runs_of(back):
                    queue.append(run)
            held = dict(sorted([*held.items(), *((record.id, record) for record in back)]))
        assert [record for run in queue for record in run.records] == list(held.values())
        assert all(list(runs_of(run.records)) == [run] for run in queue)
        assert len(queue) == len(held)
        assert queue.size_bytes == sum(len(record.payload) for record in held.values())
        assert all(queue.get(one) is record for one, record in held.items())
        assert queue.count(20, 40) == sum(20 <= one <= 40 for one in held)


@given(st.lists(st.tuples(st.integers(-100, 2000), st.integers(0, 50)), max_size=60))
def test_a_token_bucket_never_lets_more_through_than_its_rate_and_one_burst(
    steps: list[tuple[int, int]],
) -> None:
    bucket, now_ms, latest_ms, taken = TokenBucket(10, 20), 0, 0, 0
    for step_ms, wanted in steps:
        now_ms += step_ms
        latest_ms = max(latest_ms, now_ms)
        got = min(wanted, int(bucket.available(now_ms * NS_PER_MS)))
        bucket.take(got)
        taken += got
        assert (
            got >= 0 and taken <= 20 + 10 * latest_ms / 1000 + 10
        )  # a clock before its start counts from there


def _record(counter: int, *, alarm: bool = False, start: int = 2) -> Record:
    kind, level = ("alarm", Level.ALARM) if alarm else ("telemetry", Level.INFO)
    return Record(record_id(start, counter), kind, level, b"x")


def _drain(rate: int = 1000) -> Drain:
    return Drain(TokenBucket(rate, rate), TokenBucket(1 << 20, 1 << 20))


def _append(drain: Drain, *records: Record) -> None:
    for run in runs_of(records):
        drain.append(run)


def _stored(*records: Record):  # type: ignore[no-untyped-def]
    def read(lane: Lane, after: int, rows: int, _bytes: int) -> tuple[list[Record], int | None]:
        found = [r for r in sorted(records, key=lambda r: r.id) if r.is_alarm == lane.alarm and r.id > after]
        return found[:rows], found[:rows][-1].id if found[:rows] else None

    return read


def test_alarms_go_before_live_and_live_before_backlog() -> None:
    old, old_alarm = _record(1, start=1), _record(2, start=1, alarm=True)
    live, alarm = _record(1), _record(2, alarm=True)
    drain = _drain()
    _append(drain, live)
    _append(drain, alarm)
    assert drain.offer(0, 10, _stored(old, old_alarm), 1 << 20) == [alarm, old_alarm, live]
    assert drain.offer(0, 10, _stored(old, old_alarm), 1 << 20) == [old]  # live never waits for its read


def test_backlog_waits_for_the_token_bucket_and_live_never_does() -> None:
    backlog = [_record(n, start=1) for n in range(1, 9)]
    drain = _drain(rate=2)
    assert drain.offer(0, 50, _stored(*backlog), 1 << 20) == backlog[:2]
    live = _record(1)
    _append(drain, live)
    assert drain.offer(0, 50, _stored(*backlog), 1 << 20) == [live]
    assert drain.offer(NS_PER_S, 50, _stored(*backlog), 1 << 20) == backlog[2:4]


def test_a_capture_waits_with_the_backlog_while_live_records_go_past_it() -> None:
    """Its hundreds of parts would else keep the telemetry of the minute after the alarm waiting."""
    drain = Drain(TokenBucket(1000, 1000), TokenBucket(3, 3))  # three bytes, a second each
    parts = [Record(record_id(2, n), "capture", Level.INFO, b"x") for n in range(1, 6)]
    for record in [*parts, live := _record(6)]:
        _append(drain, record)
    assert drain.offer(0, 10, _stored(), 1 << 20) == [live]
    assert drain.offer(0, 10, _stored(), 1 << 20) == parts[:3]
    _append(drain, later := _record(7))
    assert drain.offer(0, 10, _stored(), 1 << 20) == [later]
    assert drain.offer(0, 10, _stored(), 1 << 20) == [], "the bucket is empty"
    drain.requeue({part.id: part for part in parts}.get)
    assert drain.offer(NS_PER_S, 10, _stored(), 1 << 20) == parts[:3]
    assert drain.offer(2 * NS_PER_S, 10, _stored(), 1 << 20) == parts[3:]


def test_the_drain_knows_whether_anything_may_be_left() -> None:
    backlog = [_record(n, start=1) for n in range(1, 4)]
    drain = _drain(rate=2)

    def offer(at_s: int, *stored: Record) -> tuple[list[Record], bool]:
        return drain.offer(at_s * NS_PER_S, 50, _stored(*stored), 1 << 20), drain.more

    assert offer(0, *backlog) == (backlog[:2], True)
    assert offer(0, *backlog) == ([], True), "the bucket is empty, and who knows"
    assert offer(1, *backlog) == (backlog[2:], True)
    assert offer(2, *backlog) == ([], False)
    _append(drain, live := _record(1))
    assert (drain.more, offer(2), offer(2)) == (True, ([live], True), ([], False))
    drain.ack(record.id for record in backlog)
    drain.requeue({live.id: live}.get)
    assert (drain.more, offer(2)) == (True, ([live], True))


def test_what_has_to_leave_ram_or_comes_back_behind_the_cursor_may_be_given_again() -> None:
    live = [_record(n) for n in range(1, 4)]
    drain = _drain()
    _append(drain, *live)
    drain.offer(0, 1, _stored(), 1 << 20)
    for change in (partial(drain.trim, 1, 1 << 20), partial(drain.rewind, ROUTINE, live[0].id)):
        drain.more = False
        change()
        assert drain.more


def test_after_the_link_died_everything_in_flight_comes_again_in_order_of_id() -> None:
    backlog = [_record(n, start=1) for n in range(1, 6)]
    drain = _drain()
    first = drain.offer(0, 50, _stored(*backlog), 1 << 20)
    drain.ack([first[1].id])
    drain.gone.add(first[1].id)
    drain.requeue(lambda _one: None)
    again = drain.offer(0, 50, _stored(*backlog), 1 << 20)
    assert again == [first[0], *first[2:]]


def test_a_late_puback_after_a_requeue_still_counts_once() -> None:
    record = _record(1)
    drain = _drain()
    _append(drain, record)
    drain.offer(0, 1, _stored(), 1 << 20)
    drain.requeue({record.id: record}.get)
    assert drain.ack([record.id])[ROUTINE] == [record.id]
    assert not any(drain.ack([record.id]).values())
    assert drain.offer(0, 9, _stored(), 1 << 20) == []


def test_live_records_that_leave_ram_become_backlog() -> None:
    live, later = [_record(n) for n in range(1, 6)], _record(9)
    drain = _drain()
    assert drain.offer(0, 9, _stored(later), 1 << 20) == [later]  # came to flash before them, after an outage
    _append(drain, *live)
    drain.trim(2, 1 << 20)
    assert drain.offer(0, 9, _stored(*live), 1 << 20) == live[3:]
    assert drain.offer(0, 9, _stored(*live), 1 << 20) == live[:3]


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(0, 9000), st.sets(st.integers(0, 40)))
def test_eviction_takes_the_oldest_and_no_more_than_needed(
    sizes: list[int], excess: int, kept: set[int]
) -> None:
    rows = [StoredRun(n, 1, 1, None, size, None) for n, size in enumerate(sizes)]
    picked = pick_oldest(rows, excess, lambda first, _last: first in kept)
    candidates = [row for row in rows if row.id not in kept]
    assert picked == candidates[: len(picked)]
    assert sum(row.sealed_bytes + 32 for row in picked[:-1]) < max(excess, 1)


def test_only_rows_with_a_known_time_and_a_limited_kind_expire() -> None:
    rows = [
        StoredRun(1, 1, 1, 100, 9, None),
        StoredRun(2, 1, 1, None, 9, None),
        StoredRun(3, 1, 2, 100, 9, None),
        StoredRun(4, 1, 1, 950, 9, None),
    ]
    assert [row.id for row in pick_expired(rows, 1000, {1: 60}, lambda _first, _last: False)] == [1]
    assert pick_expired(rows, 1000, {1: 60}, lambda first, last: first <= 1 <= last) == []


def test_a_clock_is_settled_only_when_it_ran_on_for_a_while_since_its_last_jump() -> None:
    clock = SettledClock()

    def good(second: int, jump_s: int = 0) -> Now:
        return Now(second * NS_PER_S, WALL_NS + (second + jump_s) * NS_PER_S, TimeQuality.NTP)

    assert clock.wall_s(good(0)) is None
    assert clock.wall_s(good(CLOCK_SETTLE_S)) is not None
    assert clock.wall_s(good(CLOCK_SETTLE_S + 1, jump_s=10**6)) is None
    assert clock.wall_s(Now(CLOCK_SETTLE_S * NS_PER_S, WALL_NS, TimeQuality.RTC)) is None


def test_a_drop_tells_count_bytes_and_the_range_of_ids() -> None:
    dropped = Dropped("quota")
    for one in (7, 5, 9):
        dropped.add(one, one, 1, 100)
    assert dropped.body() == {
        "event": "drop", "cause": "quota", "count": 3, "bytes": 300, "first_id": 5, "last_id": 9,
    }  # fmt: skip


@given(st.integers(0, 1 << 34), st.integers(0, 1 << 34))
def test_database_and_ballast_never_exceed_the_cap_together(cap: int, database: int) -> None:
    ballast = size_for(cap, database)
    assert ballast >= 0 and (ballast == 0 or ballast + database <= cap)
    assert size_for(cap, database + STEP_BYTES) <= ballast
    assert size_for(16 << 30, 0) == (16 << 30) - STEP_BYTES


def _start(number: int, last_id: int | None, *, clean: int | None = None) -> StartRow:
    return StartRow(number, b"", b"", clean, last_id, None)


def test_a_start_that_left_nothing_passes_on_what_it_may_not_have_told() -> None:
    assert previous_start([]) is None
    told = previous_start([_start(1, 9), _start(2, None), _start(3, None)])
    assert told is not None and told.start == 3
    assert [one.start for one in told.earlier] == [2, 1]
    settled = previous_start([_start(1, 9), _start(2, 8), _start(3, 7)])
    assert settled is not None and settled.earlier == ()
    quiet = previous_start([_start(1, 9), _start(2, None, clean=1)])
    assert quiet is not None and quiet.clean and quiet.earlier == ()
