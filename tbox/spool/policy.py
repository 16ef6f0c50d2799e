"""What the spool decides, without the disk: sets of ids, the token bucket, who is sent next, what is evicted.

A core: time comes in as nanoseconds, rows come in as values. It never reads a file, a clock or a payload.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tbox.model import NS_PER_S, Now, Record, TimeQuality

# Evictions go this far below the cap, so that a full spool does not evict in every single tick.
EVICTION_SLACK_PERCENT = 1
# What a row costs beyond its sealed bytes: cell pointer, sizes, id, header, kind, level and time.
ROW_OVERHEAD_BYTES = 28
# The age limit waits this long after the wall clock was set or jumped, and calls this much a jump.
CLOCK_SETTLE_S = 600
CLOCK_JUMP_S = 60
# How many reads one call may make when what it reads turns out to be in flight or doomed.
READS_MAX = 4


class IdRanges:
    """A set of record ids kept as ranges: acknowledgements come in any order but leave few holes."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # inclusive
        for one in ids:
            self.add(one)

    def add(self, first: int, last: int | None = None) -> None:
        """Add the ids first..last (last included; one id when it is left out)."""
        last = first if last is None else last
        assert first <= last
        lo = bisect.bisect_left(self._ends, first - 1)
        hi = bisect.bisect_right(self._starts, last + 1)
        if lo < hi:
            first = min(first, self._starts[lo])
            last = max(last, self._ends[hi - 1])
        self._starts[lo:hi] = [first]
        self._ends[lo:hi] = [last]

    def __contains__(self, one: int) -> bool:
        at = bisect.bisect_right(self._starts, one) - 1
        return at >= 0 and one <= self._ends[at]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """Return the number of ids, not of ranges."""
        return sum(last - first + 1 for first, last in self)

    def clear(self) -> None:
        self._starts.clear()
        self._ends.clear()


class TokenBucket:
    """Lets `rate` units a second through, at most `burst` at once; a clock at a standstill gives nothing."""

    def __init__(self, rate_per_s: int, burst: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._level = float(burst)
        self._at_ns: int | None = None

    def available(self, mono_ns: int) -> float:
        if self._at_ns is not None:
            gained = max(0, mono_ns - self._at_ns) * self._rate_per_s / NS_PER_S
            self._level = min(float(self._burst), self._level + gained)
        self._at_ns = mono_ns if self._at_ns is None else max(mono_ns, self._at_ns)
        return self._level

    def take(self, amount: float) -> None:
        """Take what was sent; the level may go below zero by one record and is then paid back by waiting."""
        self._level -= amount


class Lane(NamedTuple):
    """One of the two tables by priority."""

    name: str
    alarm: bool


ALARM, ROUTINE = Lane("alarm", True), Lane("routine", False)
LANES = (ALARM, ROUTINE)


def lane_of(record: Record) -> Lane:
    return ALARM if record.is_alarm else ROUTINE


# (lane, after this id, rows at most, bytes at most) -> records in order of id, and the id read up to
Reader = Callable[[Lane, int, int, int], tuple[list[Record], int | None]]


@dataclass
class _LaneState:
    fresh: dict[int, Record] = field(default_factory=dict)  # in RAM, not offered since appended
    fresh_bytes: int = 0
    cursor: int = 0  # everything on flash up to here was offered, is fresh, or is gone


class Drain:
    """Who is sent next: fresh alarms, stored alarms, live, then backlog as far as the token bucket lets it.

    Live is what was not offered since it was appended and still is in RAM; the rest is read from flash in
    order of id. Each row is read once per link: the cursor only moves back when the link died (`requeue`)
    or when live records had to leave RAM (`trim`).
    """

    def __init__(self, backlog_records: TokenBucket, backlog_bytes: TokenBucket) -> None:
        self._lanes = {lane: _LaneState() for lane in LANES}
        self._records = backlog_records
        self._bytes = backlog_bytes
        self.in_flight: dict[int, Lane] = {}
        self._again: dict[int, Lane] = {}  # was in flight when the link died; a late PUBACK still counts
        self.gone = IdRanges()  # acknowledged or evicted, and still on flash

    def append(self, record: Record) -> Lane:
        """Take a new record; return the lane it goes by."""
        lane = lane_of(record)
        state = self._lanes[lane]
        state.fresh[record.id] = record
        state.fresh_bytes += len(record.payload)
        return lane

    def offer(self, mono_ns: int, room: int, read: Reader, bytes_max: int) -> list[Record]:
        """Return at most `room` records in drain order and mark them in flight."""
        out: list[Record] = []
        self._take_fresh(ALARM, room, out)
        self._take_stored(ALARM, room - len(out), bytes_max, read, out)
        self._take_fresh(ROUTINE, room - len(out), out)
        tokens = int(min(room - len(out), self._records.available(mono_ns)))
        byte_tokens = self._bytes.available(mono_ns)
        if tokens > 0 and byte_tokens > 0:
            backlog: list[Record] = []
            self._take_stored(ROUTINE, tokens, min(bytes_max, int(byte_tokens) + 1), read, backlog)
            self._records.take(len(backlog))
            self._bytes.take(sum(len(record.payload) for record in backlog))
            out += backlog
        return out

    def _take_fresh(self, lane: Lane, room: int, out: list[Record]) -> None:
        state = self._lanes[lane]
        while room > 0 and state.fresh:
            one = next(iter(state.fresh))
            record = state.fresh.pop(one)
            state.fresh_bytes -= len(record.payload)
            self._fly(record, out)
            room -= 1

    def _take_stored(self, lane: Lane, room: int, bytes_max: int, read: Reader, out: list[Record]) -> None:
        state = self._lanes[lane]
        for _ in range(READS_MAX):
            if room <= 0 or bytes_max <= 0:
                return
            records, upto = read(lane, state.cursor, room, bytes_max)
            if upto is None:
                return
            state.cursor = upto
            for record in records:
                if record.id in self.in_flight or record.id in state.fresh or record.id in self.gone:
                    continue
                self._fly(record, out)
                room -= 1
                bytes_max -= len(record.payload)

    def _fly(self, record: Record, out: list[Record]) -> None:
        self.in_flight[record.id] = lane_of(record)
        self._again.pop(record.id, None)
        out.append(record)

    def ack(self, one: int) -> Lane | None:
        """Take one acknowledgement; return the lane of the record, None when it is not held any more."""
        lane = self.in_flight.pop(one, None)
        if lane is None:
            lane = self._again.pop(one, None)
            self._forget(one)
        return lane

    def requeue(self, in_open_tick: Callable[[int], Record | None]) -> None:
        """The link died: everything in flight is offered again, under its old id and in order of id."""
        back: dict[Lane, dict[int, Record]] = {lane: {} for lane in LANES}
        for one, lane in self.in_flight.items():
            self._again[one] = lane
            record = in_open_tick(one)
            if record is not None:
                back[lane][one] = record
            else:
                self.rewind(lane, one)
        for lane, records in back.items():
            if records:
                self._replace_fresh(lane, {**records, **self._lanes[lane].fresh})
        self.in_flight.clear()

    def trim(self, records_max: int, bytes_max: int, in_open_tick: Callable[[int], Record | None]) -> None:
        """Let the oldest live records that are safe on flash leave RAM; they become backlog."""
        for state in self._lanes.values():
            for one in list(state.fresh):
                if len(state.fresh) <= records_max and state.fresh_bytes <= bytes_max:
                    break
                if in_open_tick(one) is None:
                    state.fresh_bytes -= len(state.fresh.pop(one).payload)
                    state.cursor = min(state.cursor, one - 1)

    def drop(self, ids: Iterable[int]) -> None:
        """These records will not be sent any more."""
        for one in ids:
            self._again.pop(one, None)
            self._forget(one)

    def committed(self) -> None:
        """What was gone is off the flash now."""
        self.gone.clear()

    def rewind(self, lane: Lane, one: int) -> None:
        """A record with this id came to flash behind the cursor."""
        state = self._lanes[lane]
        state.cursor = min(state.cursor, one - 1)

    def fresh_count(self) -> int:
        return sum(len(state.fresh) for state in self._lanes.values())

    def _forget(self, one: int) -> None:
        for state in self._lanes.values():
            record = state.fresh.pop(one, None)
            if record is not None:
                state.fresh_bytes -= len(record.payload)

    def _replace_fresh(self, lane: Lane, records: dict[int, Record]) -> None:
        state = self._lanes[lane]
        state.fresh = dict(sorted(records.items()))
        state.fresh_bytes = sum(len(record.payload) for record in records.values())


class StoredRow(NamedTuple):
    """A row as eviction sees it. at_s: Unix time of its commit, None while nobody vouched for the clock."""

    id: int
    kind: int
    at_s: int | None
    sealed_bytes: int


@dataclass
class Dropped:
    """What one tick loses for one cause; it leaves as a drop record in the transaction that loses it."""

    cause: str
    count: int = 0
    bytes: int = 0
    first_id: int = 0
    last_id: int = 0

    def add(self, one: int, size_bytes: int) -> None:
        self.first_id = min(self.first_id, one) if self.told else one
        self.last_id = max(self.last_id, one)
        self.count += 1
        self.bytes += size_bytes

    def add_range(self, first: int, last: int, count: int) -> None:
        """Add `count` records that lie somewhere in first..last."""
        self.first_id = min(self.first_id, first) if self.told else first
        self.last_id = max(self.last_id, last)
        self.count += count

    @property
    def told(self) -> bool:
        """Whether there is anything to tell; a range may be lost without a count."""
        return self.last_id > 0

    def body(self) -> dict[str, object]:
        return {
            "event": "drop", "cause": self.cause, "count": self.count, "bytes": self.bytes,
            "first_id": self.first_id, "last_id": self.last_id,
        }  # fmt: skip


def evict_target_bytes(quota_bytes: int) -> int:
    """Return how far a spool at its cap is emptied."""
    return quota_bytes - max(quota_bytes * EVICTION_SLACK_PERCENT // 100, 1)


def pick_oldest(rows: Sequence[StoredRow], excess_bytes: int, keep: Callable[[int], bool]) -> list[StoredRow]:
    """Return the oldest rows that free `excess_bytes` together, without those to keep (in flight, gone)."""
    picked: list[StoredRow] = []
    for row in rows:
        if excess_bytes <= 0:
            break
        if not keep(row.id):
            picked.append(row)
            excess_bytes -= row.sealed_bytes + ROW_OVERHEAD_BYTES
    return picked


def pick_expired(
    rows: Sequence[StoredRow], wall_s: int, age_max_s: dict[int, int], keep: Callable[[int], bool]
) -> list[StoredRow]:
    """Return the rows older than their kind's age limit. A row whose time is not known never expires."""
    return [
        row
        for row in rows
        if row.at_s is not None
        and row.kind in age_max_s
        and wall_s - row.at_s > age_max_s[row.kind]
        and not keep(row.id)
    ]


class SettledClock:
    """Says the wall time once it has run steadily for a while: a jump must not expire a whole backlog."""

    def __init__(self) -> None:
        self._offset_ns: int | None = None
        self._since_ns = 0

    def wall_s(self, now: Now) -> int | None:
        """Return Unix seconds, None while the clock is unset, unsynchronised or has jumped of late."""
        if now.wall_ns is None or now.quality < TimeQuality.NTP:
            return None
        offset_ns = now.wall_ns - now.mono_ns
        if self._offset_ns is None or abs(offset_ns - self._offset_ns) > CLOCK_JUMP_S * NS_PER_S:
            self._offset_ns, self._since_ns = offset_ns, now.mono_ns
        if now.mono_ns - self._since_ns < CLOCK_SETTLE_S * NS_PER_S:
            return None
        return now.wall_ns // NS_PER_S


def trusted_wall_s(now: Now) -> int | None:
    """Return the time that a row is stamped with, None when nobody vouches for the clock."""
    if now.wall_ns is None or now.quality < TimeQuality.NTP:
        return None
    return now.wall_ns // NS_PER_S
