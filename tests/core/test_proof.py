"""The proof against stories whose truth is known, against a brute-force oracle, and against planted bugs."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.model import Record
from tbox.record.proof import Gap, IdRanges, Proof, ProofResult
from tests.memory_spool import a_start, minter


def rid(start: int, counter: int) -> int:
    return start << 32 | counter


def telemetry(start: int, counter: int) -> dict[str, Any]:
    return {"id": rid(start, counter), "kind": "telemetry", "mono": counter, "body": {}}


def event(start: int, counter: int, /, **body: Any) -> dict[str, Any]:
    return {"id": rid(start, counter), "kind": "event", "mono": counter, "body": body}


def start_record(start: int, previous: dict[str, Any] | None = None) -> dict[str, Any]:
    return event(start, 1, event="start", start=start, previous=previous)


def drop(at: tuple[int, int], count: int, first: int, last: int) -> dict[str, Any]:
    return event(*at, event="drop", cause="quota", count=count, bytes=1, first_id=first, last_id=last)


def judge(*records: dict[str, Any], **options: Any) -> ProofResult:
    proof = Proof(**options)
    for record in records:
        proof.feed(record)
    return proof.result()


def state(start: int, last: int | None, name: str = "offline") -> bytes:
    last_id = None if last is None else rid(start, last)
    return msgspec.json.encode({"state": name, "start": start, "last_id": last_id})


# --- stories ------------------------------------------------------------------------------------------


def test_nothing_received_proves_nothing() -> None:
    assert not judge().ok
    assert not judge(first_start=3).ok


def test_a_whole_start_in_any_order_is_complete() -> None:
    records = [start_record(1), *(telemetry(1, i) for i in range(2, 50)), event(1, 50, event="stop")]
    random.Random(3).shuffle(records)
    result = judge(*records)
    assert result.ok and result.received == 50 and result.starts[0].end == "stop record"


def test_a_hole_is_unexplained() -> None:
    result = judge(start_record(1), telemetry(1, 2), telemetry(1, 5))
    assert not result.ok
    assert result.gaps_unexplained == [Gap(1, 3, 4, 2)]


def test_records_missing_after_the_highest_seen_are_found_by_the_stop_state_and_by_the_next_start() -> None:
    begin = [start_record(1), telemetry(1, 2)]
    proof = Proof()
    for record in begin:
        proof.feed(record)
    assert proof.result().ok and "has not said where it ends" in proof.result().notes[0]
    proof.feed_message("tbox/1/v/state", state(1, 4))
    assert proof.result().gaps_unexplained == [Gap(1, 3, 4, 2)] and proof.stopped
    told = judge(*begin, start_record(2, {"start": 1, "last_id": rid(1, 4), "clean": False}))
    assert told.gaps_unexplained == [Gap(1, 3, 4, 2)]


@pytest.mark.parametrize("name", ["online", "lost"])
def test_only_an_offline_state_tells_where_a_start_ends(name: str) -> None:
    proof = Proof()
    proof.feed(start_record(1))
    proof.feed_message("tbox/1/v/state", state(1, 9, name))
    assert proof.result().ok and not proof.stopped


def test_duplicates_under_their_own_id_are_counted_and_harmless() -> None:
    result = judge(start_record(1), telemetry(1, 2), telemetry(1, 2), start_record(1))
    assert result.ok and (result.received, result.duplicates) == (2, 2)


def test_a_drop_record_explains_its_count_and_not_one_more() -> None:
    begin = [start_record(1), *(telemetry(1, i) for i in (2, 9)), drop((1, 10), 3, rid(1, 3), rid(1, 6))]
    result = judge(*begin, telemetry(1, 3), telemetry(1, 7), telemetry(1, 8))
    assert result.ok and result.gaps_explained == [Gap(1, 4, 6, 3, "dropped: quota")]
    one_more = judge(*begin, telemetry(1, 7), telemetry(1, 8))
    assert one_more.missing_unexplained == 1


def test_a_drop_record_that_comes_twice_explains_once() -> None:
    record = drop((1, 5), 1, rid(1, 2), rid(1, 4))
    result = judge(start_record(1), telemetry(1, 3), record, record)
    assert (result.missing_explained, result.missing_unexplained) == (1, 1)


def test_a_drop_record_of_a_later_start_explains_losses_of_an_earlier_one() -> None:
    previous = {"start": 1, "last_id": rid(1, 4), "clean": False}
    result = judge(start_record(1), start_record(2, previous), drop((2, 2), 3, rid(1, 2), rid(1, 4)))
    assert result.ok and result.missing_explained == 3


def test_ids_above_what_was_committed_are_the_open_tick_explained_and_reported() -> None:
    previous = {"start": 1, "last_id": rid(1, 3), "clean": False}
    result = judge(*[telemetry(1, i) for i in (2, 3, 6)], start_record(1), start_record(2, previous))
    assert result.ok and result.gaps_explained == [Gap(1, 4, 5, 2, "open tick")]
    assert result.starts[0].committed == 3 and result.starts[0].clean is False


def test_a_start_that_committed_nothing_before_its_power_cut_is_all_open_tick() -> None:
    previous = {"start": 1, "last_id": rid(1, 1), "clean": True}
    result = judge(start_record(1), telemetry(2, 3), start_record(3, previous))
    assert result.ok and result.gaps_explained == [Gap(2, 1, 2, 2, "open tick")]


def test_a_start_that_is_told_of_and_never_seen_is_missing_as_a_whole() -> None:
    previous = {"start": 2, "last_id": rid(2, 5), "clean": True}
    told = {"start": 1, "last_id": rid(1, 1), "clean": True}
    result = judge(start_record(1), start_record(3, previous))
    assert Gap(2, 1, 5, 5) in result.gaps_unexplained
    seen = [start_record(2, told), *(telemetry(2, i) for i in range(2, 6))]
    assert judge(start_record(1), *seen, start_record(3, previous)).ok


def test_a_start_record_also_tells_of_starts_whose_successor_left_no_record() -> None:
    """Start 2 was cut off before its first commit: start 3 tells of both."""
    earlier = [{"start": 1, "last_id": rid(1, 2), "clean": False}]
    previous = {"start": 2, "last_id": None, "clean": False, "earlier": earlier}
    result = judge(start_record(1), telemetry(1, 4), telemetry(2, 3), start_record(3, previous))
    assert result.gaps_unexplained == [Gap(1, 2, 2, 1)]
    open_ticks = [gap for gap in result.gaps_explained if gap.why == "open tick"]
    assert open_ticks == [Gap(1, 3, 3, 1, "open tick"), Gap(2, 1, 2, 2, "open tick")]
    assert [report.end for report in result.starts] == ["next start", "next start", "highest seen"]


def test_without_its_start_record_a_start_still_begins_at_one_and_it_is_said() -> None:
    result = judge(telemetry(4, 7), telemetry(4, 8))
    assert result.gaps_unexplained == [Gap(4, 1, 6, 6)]
    assert "start 4: its start record did not arrive" in result.notes
    late = judge(telemetry(4, 7), telemetry(4, 8), from_first_seen=True)
    assert late.ok


def test_an_earlier_start_whose_end_nobody_tells_is_a_problem() -> None:
    result = judge(start_record(1), telemetry(1, 2), telemetry(2, 2), drop((2, 3), 1, rid(2, 1), rid(2, 1)))
    assert not result.ok and result.problems == ["start 1: no later start says where it ended"]


def test_a_lost_spool_is_not_passed_over() -> None:
    result = judge(start_record(1), start_record(2, None))
    assert not result.ok and "start 1: no later start says" in result.problems[0]


def test_an_expected_start_of_which_nothing_came_is_missing() -> None:
    previous = {"start": 7, "last_id": rid(7, 3), "clean": True}
    assert judge(start_record(8, previous)).ok
    result = judge(start_record(8, previous), first_start=7)
    assert result.gaps_unexplained == [Gap(7, 1, 3, 3)]


def test_one_record_under_two_ids_and_two_under_one_are_problems() -> None:
    twice = judge(start_record(1), telemetry(1, 2), {**telemetry(1, 3), "mono": 2})
    assert not twice.ok and "are the same one twice" in twice.problems[0]
    other = judge(start_record(1), telemetry(1, 2), {**telemetry(1, 2), "body": {"x": 1}})
    assert not other.ok and "different content" in other.problems[0]


def test_messages_are_told_apart_by_topic_and_unreadable_ones_counted() -> None:
    proof = Proof()
    for record in a_start(minter(), 3):
        assert proof.feed_message(f"tbox/1/v/{record.kind}", record.payload) is not None
    assert proof.feed_message("tbox/1/v/command", b"?") is None
    assert proof.result().ok
    assert proof.feed_message("tbox/1/v/telemetry", b"garbage") is None
    assert proof.result().unreadable == 1 and not proof.result().ok


def test_a_record_on_the_wrong_topic_is_a_problem() -> None:
    proof = Proof()
    proof.feed_message("tbox/1/v/alarm", a_start(minter(), 0)[0].payload)
    assert not proof.result().ok


@pytest.mark.parametrize(
    "body",
    [
        {"event": "start", "previous": 3},
        {"event": "start", "previous": {"start": "x", "last_id": []}},
        {"event": "start", "previous": {"start": 1, "last_id": rid(9, 9)}},
        {"event": "drop", "count": -5, "first_id": 1, "last_id": 2},
        {"event": "drop", "count": 10**9, "first_id": 9, "last_id": 2},
        {"event": "drop", "count": "all", "first_id": 1, "last_id": 2},
        {"event": ["start"]},
    ],
)
def test_a_malformed_record_about_records_explains_nothing(body: dict[str, Any]) -> None:
    result = judge(
        start_record(1),
        telemetry(1, 2),
        telemetry(1, 4),
        {**telemetry(1, 5), "kind": "event"} | {"body": body},
    )
    assert result.missing_unexplained == 1


def test_impossible_ids_are_counted_as_unreadable() -> None:
    result = judge({**telemetry(1, 1), "id": -1}, {**telemetry(1, 1), "id": 5 << 32})
    assert result.unreadable == 2 and not result.ok


# --- an oracle ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)), st.integers(0, 20), st.integers(0, 45))
def test_id_ranges_behave_like_a_set(numbers: list[int], first: int, last: int) -> None:
    ranges, plain = IdRanges(), set[int]()
    for number in numbers:
        assert ranges.add(number) == (number not in plain)
        plain.add(number)
    assert {n for low, high in ranges for n in range(low, high + 1)} == plain
    missing = {n for low, high in ranges.missing(first, last) for n in range(low, high + 1)}
    assert missing == set(range(first, last + 1)) - plain
    assert (ranges.lowest, ranges.highest) == (min(plain, default=0), max(plain, default=0))


def most_explained(missing: list[int], drops: list[tuple[int, int, int]]) -> int:
    """The oracle: the largest matching of missing ids with places in drop records, by augmenting paths."""
    places = [(first, last) for count, first, last in drops for _ in range(count)]
    taken: dict[int, int] = {}

    def seat(number: int, tried: set[int]) -> bool:
        for i, (first, last) in enumerate(places):
            if first <= number <= last and i not in tried:
                tried.add(i)
                if i not in taken or seat(taken[i], tried):
                    taken[i] = number
                    return True
        return False

    return sum(seat(number, set()) for number in missing)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_verdict_is_that_of_a_brute_force_oracle(data: st.DataObject) -> None:
    """Three starts, of which some committed ids vanish and some drop records tell of some of them."""
    sizes = [data.draw(st.integers(1, 9)) for _ in range(3)]
    committed = [data.draw(st.integers(0, size)) for size in sizes[:2]]
    records: list[dict[str, Any]] = []
    missing: list[int] = []
    open_tick = 0
    previous: dict[str, Any] | None = None
    for start, size in enumerate(sizes, 1):
        bound = committed[start - 1] if start < 3 else size
        records.append(start_record(start, previous))
        for counter in range(2, size + 1):
            if data.draw(st.booleans()):
                records.append(telemetry(start, counter))
        seen = {r["id"] for r in records}
        top = max(number & 0xFFFF for number in seen if number >> 32 == start)
        upper = max(bound, top) if start < 3 else top
        for counter in range(1, upper + 1):
            if rid(start, counter) not in seen:
                missing += [rid(start, counter)] if counter <= bound else []
                open_tick += counter > bound
        last_id = rid(start, bound) if bound else None
        previous = {"start": start, "last_id": last_id, "clean": False}
    ids = st.integers(1, 3).flatmap(lambda s: st.integers(1, 9).map(lambda c: rid(s, c)))
    drops = []
    for _ in range(data.draw(st.integers(0, 4))):
        first, last = sorted([data.draw(ids), data.draw(ids)])
        drops.append((data.draw(st.integers(1, 4)), first, last))
    tail = sizes[2] + 1
    records += [telemetry(3, n) for n in range(2, tail) if telemetry(3, n) not in records] if drops else []
    if drops:  # the drop records themselves follow without a hole
        missing = [number for number in missing if number >> 32 != 3]
    records += [drop((3, tail + i), *what) for i, what in enumerate(drops)]
    data.draw(st.randoms(use_true_random=False)).shuffle(records)
    result = judge(*records)
    explained = most_explained(missing, drops)
    assert result.missing_unexplained == len(missing) - explained
    assert result.missing_explained == explained + open_tick
    assert result.ok == (len(missing) == explained)


def test_a_million_ids_dropped_at_once_take_no_time() -> None:
    far = rid(1, 2_000_000)
    records = [start_record(1), drop((1, 2_000_001), 1_999_999, rid(1, 2), far)]
    result = judge(*records)
    assert result.ok and result.missing_explained == 1_999_999


def feed_all(records: list[Record]) -> ProofResult:
    proof = Proof()
    for record in records:
        proof.feed_message(f"tbox/1/v/{record.kind}", record.payload)
    return proof.result()


@given(st.integers(1, 30), st.data())
def test_any_single_record_that_vanishes_turns_the_proof_red(n: int, data: st.DataObject) -> None:
    first = a_start(minter(1), n)
    previous = {"start": 1, "last_id": first[-1].id, "clean": True}
    records = first + a_start(minter(2), 3, previous)
    assert feed_all(records).ok
    lost = data.draw(st.integers(0, len(records) - 2))  # the very last leaves no trace but the state
    assert not feed_all(records[:lost] + records[lost + 1 :]).ok
