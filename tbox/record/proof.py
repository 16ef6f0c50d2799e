"""Proves from the receiver's side that no record is missing, from ids and the records about records.

It believes nothing but what arrived, and never asks the vehicle.

Within a start the ids run 1, 2, 3 …; where they end is known from, in this order,
- a later start's start record: `previous.last_id` is what had been committed, and `previous.earlier` says
  the same of starts whose successor left no record. Ids above it that never arrived are that start's open
  tick: explained, bounded below by what was seen, and reported;
- a stop record, whose own id is the last;
- the retained state message, when it says offline and tells the last id;
- else nothing: then only what lies below the highest id seen can be judged.
A drop record explains `count` ids between its `first_id` and `last_id`, and not one more.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from tbox.model import COUNTER_BITS, COUNTER_MAX
from tbox.record.codec import PayloadError, decode_payload

GAPS_SHOWN_MAX = 50
PROBLEMS_SHOWN_MAX = 20
# How many of the last records are remembered by content, to see one record under two ids and two under one.
CONTENTS_REMEMBERED_MAX = 1 << 16
STARTS_MAX = 10_000
DROPS_MAX = 1_000_000

End = Literal["next start", "stop record", "offline state", "highest seen"]


class IdRanges:
    """A set of non-negative integers, kept as ranges: small while there are few gaps."""

    def __init__(self) -> None:
        self._first: list[int] = []
        self._last: list[int] = []

    def add(self, number: int) -> bool:
        """Put a number in; return whether it was new."""
        i = bisect_right(self._first, number)
        if i and number <= self._last[i - 1]:
            return False
        joins_left = i > 0 and self._last[i - 1] == number - 1
        joins_right = i < len(self._first) and self._first[i] == number + 1
        if joins_left and joins_right:
            self._last[i - 1] = self._last.pop(i)
            del self._first[i]
        elif joins_left:
            self._last[i - 1] = number
        elif joins_right:
            self._first[i] = number
        else:
            self._first.insert(i, number)
            self._last.insert(i, number)
        return True

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._first, number)
        return i > 0 and number <= self._last[i - 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._first, self._last, strict=True))

    @property
    def highest(self) -> int:
        """The largest member, 0 when empty."""
        return self._last[-1] if self._last else 0

    @property
    def lowest(self) -> int:
        """The smallest member, 0 when empty."""
        return self._first[0] if self._first else 0

    def missing(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The ranges within [first, last] that are not in the set."""
        expected = first
        for low, high in self:
            if low > last:
                break
            if low > expected:
                yield expected, low - 1
            expected = max(expected, high + 1)
        if expected <= last:
            yield expected, last


class Gap(msgspec.Struct, frozen=True):
    """Records of one start that did not arrive. first, last: counters; why "" where nothing explains it."""

    start: int
    first: int
    last: int
    count: int
    why: str = ""


class StartReport(msgspec.Struct, frozen=True):
    """What is known of one start. committed: the last counter that was committed, None where nobody told."""

    start: int
    received: int
    duplicates: int
    start_record: bool
    end: End
    last: int
    committed: int | None
    clean: bool | None


class ProofResult(msgspec.Struct, frozen=True):
    """The verdict. ok: something arrived, nothing is missing unexplained and no problem was seen."""

    ok: bool
    received: int
    duplicates: int
    unreadable: int
    missing_explained: int
    missing_unexplained: int
    gaps_explained: list[Gap]
    gaps_unexplained: list[Gap]
    starts: list[StartReport]
    state: dict[str, Any] | None
    problems: list[str]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a start record says of the start before."""

    start: int
    last: int | None  # counter; None: nothing was committed
    clean: bool


@dataclass(frozen=True, slots=True)
class _Drop:
    first_id: int
    last_id: int
    count: int
    cause: str


@dataclass(slots=True)
class _Start:
    ids: IdRanges = field(default_factory=IdRanges)
    received: int = 0
    duplicates: int = 0
    start_record: bool = False
    stop_last: int | None = None
    previous: _Claim | None = None


class Proof:
    """Feed it what arrived, in any order; ask for the result at any time.

    first_start: the first start that must be complete; None: the first one seen. from_first_seen: do not
    ask for what the first start sent before the receiver listened.
    """

    def __init__(self, *, first_start: int | None = None, from_first_seen: bool = False) -> None:
        self._first_start = first_start
        self._from_first_seen = from_first_seen
        self._starts: dict[int, _Start] = {}
        self._claims: dict[int, _Claim] = {}  # by the start they are about
        self._drops: dict[int, _Drop] = {}  # by the id of the drop record, so that a duplicate counts once
        self._contents: OrderedDict[int, int] = OrderedDict()  # id -> hash of what it says
        self._ids: dict[int, int] = {}  # hash -> id
        self._state: dict[str, Any] | None = None
        self._problems: list[str] = []
        self.received = 0
        self.duplicates = 0
        self.unreadable = 0

    # --- feeding --------------------------------------------------------------------------------------

    def feed_message(self, topic: str, payload: bytes) -> dict[str, Any] | None:
        """Take an MQTT message as it came; return the record it holds, None for anything else."""
        leaf = topic.rpartition("/")[2]
        if leaf == "state":
            self._feed_state(payload)
            return None
        if leaf in ("command", "reply"):
            return None
        try:
            record = decode_payload(payload)
        except PayloadError as error:
            self.unreadable += 1
            self._problem(f"a message on {topic} cannot be read: {error}")
            return None
        if record["kind"] != leaf:
            self._problem(f"record {record['id']} of kind {record['kind']} came on {topic}")
        self.feed(record)
        return record

    def feed(self, record: dict[str, Any]) -> bool:
        """Take a decoded record {"id", "kind", "mono", "body", …}; return whether it was new."""
        number: int = record["id"]
        start, counter = number >> COUNTER_BITS, number & COUNTER_MAX
        if number <= 0 or counter == 0 or (start not in self._starts and len(self._starts) >= STARTS_MAX):
            self.unreadable += 1
            self._problem(f"{number} cannot be the id of a record")
            return False
        known = self._starts.setdefault(start, _Start())
        self._compare(record)
        if not known.ids.add(counter):
            self.duplicates += 1
            known.duplicates += 1
            return False
        self.received += 1
        known.received += 1
        if record["kind"] == "event":
            self._feed_event(number, known, record["body"])
        return True

    def _feed_state(self, payload: bytes) -> None:
        try:
            state = msgspec.json.decode(payload)
            if (
                isinstance(state, dict)
                and isinstance(state["start"], int)
                and isinstance(state["state"], str)
            ):
                self._state = state
        except (msgspec.DecodeError, KeyError, RecursionError):
            self._problem("the state message cannot be read")

    def _feed_event(self, number: int, known: _Start, body: dict[str, Any]) -> None:
        """Take the records about records. A field that is not what it should be explains nothing."""
        match body:
            case {"event": "start", "previous": previous}:
                known.start_record = True
                claims = _claims(previous)
                known.previous = claims[0] if claims else None
                for claim in claims:
                    self._claims.setdefault(claim.start, claim)
            case {"event": "stop"}:
                known.stop_last = number & COUNTER_MAX
            case {"event": "drop", "count": int(count), "first_id": int(first), "last_id": int(last)}:
                if 0 < first <= last and count > 0 and len(self._drops) < DROPS_MAX:
                    self._drops[number] = _Drop(first, last, count, str(body.get("cause", "?")))

    def _compare(self, record: dict[str, Any]) -> None:
        """One id must not say two things, nor two ids of a start the same thing at the same nanosecond."""
        number = record["id"]
        start = number >> COUNTER_BITS
        said = hash((start, record["kind"], record["mono"], msgspec.msgpack.encode(record["body"])))
        if self._contents.get(number, said) != said:
            self._problem(f"record {_name(number)} came twice with different content")
        elif self._ids.get(said, number) != number:
            self._problem(f"records {_name(self._ids[said])} and {_name(number)} are the same one twice")
        self._contents[number] = said
        self._ids[said] = number
        if len(self._contents) > CONTENTS_REMEMBERED_MAX:
            _, old = self._contents.popitem(last=False)
            self._ids.pop(old, None)

    def _problem(self, text: str) -> None:
        if len(self._problems) < PROBLEMS_SHOWN_MAX and text not in self._problems:
            self._problems.append(text)

    # --- the verdict ----------------------------------------------------------------------------------

    @property
    def stopped(self) -> bool:
        """Whether the latest start seen has said that it ended: a stop record, or the state offline."""
        if not self._starts:
            return False
        latest = max(self._starts)
        return self._starts[latest].stop_last is not None or self._offline_last(latest) is not None

    def result(self) -> ProofResult:
        """Return the verdict on all that was fed so far."""
        scope = self._scope()
        reports = [self._report(start) for start in scope]
        committed: list[tuple[int, int]] = []
        open_tick: list[Gap] = []
        for report in reports:
            first = self._lower_bound(report)
            ids = self._starts[report.start].ids if report.start in self._starts else IdRanges()
            judged = report.last if report.committed is None else min(report.committed, report.last)
            base = report.start << COUNTER_BITS
            committed += [(base + low, base + high) for low, high in ids.missing(first, judged)]
            above = ids.missing(max(first, judged + 1), report.last)
            open_tick += [Gap(report.start, low, high, high - low + 1, "open tick") for low, high in above]
        explained, unexplained = explain(committed, self._drops.values())
        explained = sorted([*explained, *open_tick], key=lambda gap: (gap.start, gap.first))
        problems = self._problems + self._open_ends(reports)
        missing = sum(gap.count for gap in unexplained)
        return ProofResult(
            ok=self.received > 0 and not missing and not problems,
            received=self.received,
            duplicates=self.duplicates,
            unreadable=self.unreadable,
            missing_explained=sum(gap.count for gap in explained),
            missing_unexplained=missing,
            gaps_explained=explained[:GAPS_SHOWN_MAX],
            gaps_unexplained=unexplained[:GAPS_SHOWN_MAX],
            starts=reports,
            state=self._state,
            problems=problems,
            notes=self._notes(reports),
        )

    def _scope(self) -> list[int]:
        """The starts that are judged: those seen and those told of, from the first that counts."""
        first = self._first_start if self._first_start is not None else min(self._starts, default=0)
        expected = {self._first_start} if self._first_start is not None else set()
        return sorted(start for start in set(self._claims) | set(self._starts) | expected if start >= first)

    def _report(self, start: int) -> StartReport:
        known = self._starts.get(start, _Start())
        claim = self._claim_on(start)
        highest = known.ids.highest
        committed: int | None = None
        last = highest
        end: End = "highest seen"
        if claim is not None:
            committed = claim.last or 0
            last, end = max(highest, committed), "next start"
        elif known.stop_last is not None:
            last, end = max(highest, known.stop_last), "stop record"
        elif (told := self._offline_last(start)) is not None:
            last, end = max(highest, told), "offline state"
        return StartReport(
            start=start,
            received=known.received,
            duplicates=known.duplicates,
            start_record=known.start_record,
            end=end,
            last=last,
            committed=committed,
            clean=claim.clean if claim is not None else None,
        )

    def _claim_on(self, start: int) -> _Claim | None:
        """What a later start said of this one; if the next names an earlier one, nothing was committed."""
        if start in self._claims:
            return self._claims[start]
        later = [s for s in self._starts if s > start and self._starts[s].start_record]
        before = self._starts[min(later)].previous if later else None
        return _Claim(start, None, False) if before is not None and before.start < start else None

    def _offline_last(self, start: int) -> int | None:
        state = self._state
        if state is None or state.get("state") != "offline" or state.get("start") != start:
            return None
        last = state.get("last_id")
        return last & COUNTER_MAX if isinstance(last, int) and last >> COUNTER_BITS == start else None

    def _lower_bound(self, report: StartReport) -> int:
        first_seen = min(self._starts, default=report.start)
        if self._from_first_seen and report.start == first_seen and not report.start_record:
            return self._starts[report.start].ids.lowest
        return 1

    def _open_ends(self, reports: list[StartReport]) -> list[str]:
        """Say which starts before the last end at nobody knows where: no verdict on them can be whole."""
        return [
            f"start {report.start}: no later start says where it ended"
            for report in reports[:-1]
            if report.end == "highest seen"
        ][:PROBLEMS_SHOWN_MAX]

    def _notes(self, reports: list[StartReport]) -> list[str]:
        """What a person should know beside the verdict."""
        notes = [
            f"start {report.start}: its start record did not arrive"
            for report in reports
            if not report.start_record and not (report.committed == 0 and report.received == 0)
        ]
        if reports and reports[-1].end == "highest seen":
            notes.append(
                f"start {reports[-1].start}: has not said where it ends; judged up to the highest seen"
            )
        return notes[:PROBLEMS_SHOWN_MAX]


def _claims(previous: object) -> list[_Claim]:
    """Read what a start record says of the start before, and of those before that nobody told of."""
    if not isinstance(previous, dict):
        return []
    earlier = previous.get("earlier")
    told = [previous, *(earlier[:STARTS_MAX] if isinstance(earlier, list) else [])]
    claims = [_claim(one) for one in told if isinstance(one, dict)]
    return [claim for claim in claims if claim is not None]


def _claim(told: dict[str, Any]) -> _Claim | None:
    start, last, clean = told.get("start"), told.get("last_id"), told.get("clean") is True
    if not isinstance(start, int):
        return None
    if last is None:
        return _Claim(start, None, clean)
    if isinstance(last, int) and last >> COUNTER_BITS == start:
        return _Claim(start, last & COUNTER_MAX, clean)
    return None


def explain(missing: Iterable[tuple[int, int]], drops: Iterable[_Drop]) -> tuple[list[Gap], list[Gap]]:
    """Match missing ids with drop records, each of which explains `count` ids of its range.

    missing: ranges of ids, ascending. Among the drops that cover an id the one that ends first is used up
    first, which explains as many ids as any choice could. Returns (explained, unexplained).
    """
    waiting = sorted(drops, key=lambda drop: drop.first_id, reverse=True)
    open_drops: list[tuple[int, int, int, str]] = []  # last_id, order, left, cause
    order = 0
    explained: list[Gap] = []
    unexplained: list[Gap] = []
    for low, high in missing:
        here = low
        while here <= high:
            while waiting and waiting[-1].first_id <= here:
                drop = waiting.pop()
                order += 1
                heapq.heappush(open_drops, (drop.last_id, order, drop.count, drop.cause))
            while open_drops and open_drops[0][0] < here:
                heapq.heappop(open_drops)
            until = min(high, waiting[-1].first_id - 1) if waiting else high
            if not open_drops:
                _note(unexplained, here, until, "")
            else:
                last, turn, left, cause = heapq.heappop(open_drops)
                until = min(until, last, here + left - 1)
                _note(explained, here, until, f"dropped: {cause}")
                if left > until - here + 1:
                    heapq.heappush(open_drops, (last, turn, left - (until - here + 1), cause))
            here = until + 1
    return explained, unexplained


def _note(gaps: list[Gap], low: int, high: int, why: str) -> None:
    """Add a range of ids, joined to the one before where it follows on for the same reason."""
    start, first, last = low >> COUNTER_BITS, low & COUNTER_MAX, high & COUNTER_MAX
    if gaps and gaps[-1].why == why and gaps[-1].start == start and gaps[-1].last == first - 1:
        first = gaps.pop().first
    gaps.append(Gap(start, first, last, last - first + 1, why))


def _name(number: int) -> str:
    return f"{number >> COUNTER_BITS}/{number & COUNTER_MAX}"
