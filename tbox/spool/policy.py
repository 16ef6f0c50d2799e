"""What the spool decides, without the disk: sets of ids, the token bucket, who is sent next, what is evicted.

A core: time comes in as nanoseconds, rows come in as values. It never reads a file, a clock or a payload.
"""

from __future__ import annotations

import bisect
import struct
import sys
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tbox.model import NS_PER_S, Now, Record, TimeQuality

# Evictions go this far below the cap, so that a full spool does not evict in every single tick.
EVICTION_SLACK_PERCENT = 1
# What a row costs beyond its sealed bytes: cell pointer, sizes, id, header, length, kind, level and time.
ROW_OVERHEAD_BYTES = 32
# A run is lost whole when a bit of it is; beyond this many payload bytes a new one begins.
RUN_BYTES_MAX = 32 * 1024
RUN_RECORDS_MAX = 1024
# The age limit waits this long after the wall clock was set or jumped, and calls this much a jump.
CLOCK_SETTLE_S = 600
CLOCK_JUMP_S = 60
# How many reads one call may make when what it reads turns out to be in flight or doomed.
READS_MAX = 4
_OFFSETS = struct.Struct("<HH")
_SUM = struct.Struct("<I")


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

    def within(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the set that lie in first..last."""
        for at in range(bisect.bisect_left(self._ends, first), len(self._ends)):
            if self._starts[at] > last:
                return
            yield max(first, self._starts[at]), min(last, self._ends[at])

    def without(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of first..last that are not in the set."""
        for begin, end in self.within(first, last):
            if first < begin:
                yield first, begin - 1
            first = end + 1
        if first <= last:
            yield first, last

    def end_of(self, one: int) -> int:
        """Return the end of the range that `one` is in, 0 when it is in none."""
        at = bisect.bisect_left(self._ends, one)
        return self._ends[at] if at < len(self._ends) and self._starts[at] <= one else 0

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
# They wait with the backlog even while they are fresh: a capture is up to 400 records of 60 KiB, and what the
# vehicle tells meanwhile must not stand in line behind it.
PATIENT_KINDS = frozenset({"capture"})


def lane_of(record: Record) -> Lane:
    return ALARM if record.is_alarm else ROUTINE


def runs_of(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Cut records into runs: consecutive ids of one kind and level, up to the limits of a run."""
    run: list[Record] = []
    next_id = size_bytes = level = 0
    kind = ""
    for record in records:
        size_bytes += len(record.payload)
        if (
            record.id != next_id
            or record.level != level
            or record.kind != kind
            or size_bytes > RUN_BYTES_MAX
            or len(run) == RUN_RECORDS_MAX
        ):
            if run:
                yield run
            run, size_bytes, level, kind = [], len(record.payload), record.level, record.kind
        run.append(record)
        next_id = record.id + 1
    if run:
        yield run


def ranges_of(ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Cut ids, which come in rising order, into ranges."""
    first = last = 0
    for one in ids:
        if one != last + 1 or not last:
            if last:
                yield first, last
            first = one
        last = one
    if last:
        yield first, last


# (lane, after this id, records at most, bytes at most) -> stored records in order of id, and the id read up
# to; the last run comes whole, so more may come than was asked for
Reader = Callable[[Lane, int, int, int], tuple[list[Record], int | None]]


@dataclass
class _LaneState:
    fresh: dict[int, Record] = field(default_factory=dict)  # in RAM, not offered since appended
    fresh_bytes: int = 0
    cursor: int = 0  # everything on flash up to here was offered, is fresh, or is gone


class Drain:
    """Who is sent next: fresh alarms, stored alarms, live, then captures and backlog as the bucket lets.

    Live is what was not offered since it was appended and still is in RAM; the rest is read from flash in
    order of id, and only when there is nothing livelier to give out: nothing fresh waits for a read. Each run
    is read once per link: the cursor only moves back when the link died (`requeue`) or when live records had
    to leave RAM (`trim`).
    """

    def __init__(self, backlog_records: TokenBucket, backlog_bytes: TokenBucket) -> None:
        self._lanes = {lane: _LaneState() for lane in LANES}
        self._records = backlog_records
        self._bytes = backlog_bytes
        self.in_flight: dict[int, Lane] = {}
        self._again: dict[int, Lane] = {}  # was in flight when the link died; a late PUBACK still counts
        self.gone = IdRanges()  # acknowledged or evicted, and still on flash
        self.more = True  # whether the next offer may find something: the last did not see the end of all

    def append(self, records: Sequence[Record]) -> bool:
        """Take new records; return whether to commit at once: an alarm is among them, or what led to one."""
        alarms = [record for record in records if record.is_alarm]
        self._add_fresh(ALARM, alarms)
        self._add_fresh(ROUTINE, [one for one in records if not one.is_alarm] if alarms else records)
        return bool(alarms) or any(record.kind in PATIENT_KINDS for record in records)

    def _add_fresh(self, lane: Lane, records: Sequence[Record]) -> None:
        state = self._lanes[lane]
        self.more |= bool(records)
        state.fresh |= {record.id: record for record in records}
        state.fresh_bytes += sum(len(record.payload) for record in records)

    def offer(self, mono_ns: int, room: int, read: Reader, bytes_max: int) -> list[Record]:
        """Return at most `room` records in drain order and mark them in flight."""
        before = [state.cursor for state in self._lanes.values()]
        self.more = True
        out = self._take_fresh(ALARM, room)
        out += self._take_stored(ALARM, room - len(out), bytes_max, read)
        out += self._take_fresh(ROUTINE, room - len(out))
        if out:
            return out
        tokens = int(min(room, self._records.available(mono_ns)))
        byte_tokens = int(self._bytes.available(mono_ns))
        if tokens > 0 and byte_tokens > 0:
            out = self._take_fresh(ROUTINE, tokens, patient=True, bytes_max=byte_tokens)
            out = out or self._take_stored(ROUTINE, tokens, min(bytes_max, byte_tokens), read)
            self._records.take(len(out))
            self._bytes.take(sum(len(record.payload) for record in out))
            self.more = bool(out) or before != [state.cursor for state in self._lanes.values()]
        return out

    def _take_fresh(
        self, lane: Lane, room: int, *, patient: bool = False, bytes_max: int = sys.maxsize
    ) -> list[Record]:
        """Take fresh records, of PATIENT_KINDS or all others; the last may go beyond bytes_max."""
        state = self._lanes[lane]
        out: list[Record] = []
        for record in state.fresh.values():
            if len(out) >= room or bytes_max <= 0:
                break
            if (record.kind in PATIENT_KINDS) is patient:
                out.append(record)
                bytes_max -= len(record.payload)
        for record in out:
            del state.fresh[record.id]
            state.fresh_bytes -= len(record.payload)
        self._fly(lane, out)
        return out

    def _take_stored(self, lane: Lane, room: int, bytes_max: int, read: Reader) -> list[Record]:
        state = self._lanes[lane]
        taken: list[Record] = []
        for _ in range(READS_MAX):
            if room <= 0 or bytes_max <= 0:
                break
            records, upto = read(lane, state.cursor, room, bytes_max)
            if upto is None:
                break
            state.cursor = upto
            for number, record in enumerate(records):
                if room <= 0 or bytes_max <= 0:
                    state.cursor = records[number - 1].id
                    break
                if record.id in self.in_flight or record.id in state.fresh or record.id in self.gone:
                    continue
                taken.append(record)
                room -= 1
                bytes_max -= len(record.payload)
        self._fly(lane, taken)
        return taken

    def _fly(self, lane: Lane, records: Sequence[Record]) -> None:
        self.in_flight.update(dict.fromkeys((record.id for record in records), lane))
        if self._again:
            for record in records:
                self._again.pop(record.id, None)

    def ack(self, ids: Iterable[int]) -> dict[Lane, list[int]]:
        """Take acknowledgements; return the ids by lane, in order, without those not held any more."""
        held: dict[Lane, list[int]] = {lane: [] for lane in LANES}
        for one in ids:
            lane = self.in_flight.pop(one, None)
            if lane is None:
                lane = self._again.pop(one, None)
                self._forget(one)
            if lane is not None:
                held[lane].append(one)
        for ones in held.values():
            ones.sort()
        return held

    def is_flying(self, first: int, last: int) -> bool:
        """Whether one of these ids is in flight."""
        return bool(self.in_flight) and not self.in_flight.keys().isdisjoint(range(first, last + 1))

    def is_in_ram(self, lane: Lane, first: int, last: int) -> bool:
        """Whether one of these ids is in flight or waits to be."""
        fresh = self._lanes[lane].fresh.keys()
        return self.is_flying(first, last) or not fresh.isdisjoint(range(first, last + 1))

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
        self.more |= bool(self.in_flight)
        for lane, records in back.items():
            if records:
                self._replace_fresh(lane, {**records, **self._lanes[lane].fresh})
        self.in_flight.clear()

    def trim(self, records_max: int, bytes_max: int, open_tick: Container[int]) -> None:
        """Let the oldest live records that are safe on flash leave RAM; they become backlog."""
        for state in self._lanes.values():
            leaving: list[int] = []
            left, left_bytes = len(state.fresh), state.fresh_bytes
            for one, record in state.fresh.items():
                if left <= records_max and left_bytes <= bytes_max:
                    break
                if one not in open_tick:
                    leaving.append(one)
                    left, left_bytes = left - 1, left_bytes - len(record.payload)
            for one in leaving:
                del state.fresh[one]
            self.more |= bool(leaving)
            state.fresh_bytes = left_bytes
            state.cursor = min([state.cursor, *(one - 1 for one in leaving)])

    def drop(self, first: int, last: int) -> None:
        """These records will not be sent any more."""
        if self._again or self.fresh_count():
            for one in range(first, last + 1):
                self._again.pop(one, None)
                self._forget(one)

    def committed(self) -> None:
        """What was gone is off the flash now."""
        self.gone.clear()

    def rewind(self, lane: Lane, one: int) -> None:
        """A record with this id came to flash behind the cursor."""
        self.more = True
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


class StoredRun(NamedTuple):
    """A run as eviction sees it. at_s: Unix time of its commit, None while nobody vouched for the clock."""

    id: int
    n: int
    kind: int
    at_s: int | None
    sealed_bytes: int
    gone: bytes | None  # what of it is gone, as `partly` keeps it

    @property
    def last_id(self) -> int:
        return self.id + self.n - 1


def packed(ranges: IdRanges, first_id: int) -> bytes:
    """Return what of a run is gone as it stands in `partly`: offsets of range ends, and a sum in front.

    It is not sealed with the run, and a flipped bit in it would lose a record in silence.
    """
    offsets = b"".join(_OFFSETS.pack(first - first_id, last - first_id) for first, last in ranges)
    return _SUM.pack(zlib.crc32(offsets, first_id & 0xFFFF_FFFF)) + offsets


def is_packed(gone: object, first_id: int) -> bool:
    """Whether this is what `packed` has returned for the run, or None for one of which all is held."""
    if gone is None:
        return True
    if not isinstance(gone, bytes) or len(gone) % _OFFSETS.size or len(gone) <= _SUM.size:
        return False
    return _SUM.pack(zlib.crc32(gone[_SUM.size :], first_id & 0xFFFF_FFFF)) == gone[: _SUM.size]


def unpacked(gone: bytes | None, first_id: int) -> IdRanges:
    ranges = IdRanges()
    for first, last in _OFFSETS.iter_unpack(gone[_SUM.size :] if gone else b""):
        ranges.add(first_id + first, first_id + last)
    return ranges


@dataclass
class Dropped:
    """What one tick loses for one cause; it leaves as a drop record in the transaction that loses it."""

    cause: str
    count: int = 0
    bytes: int = 0
    first_id: int = 0
    last_id: int = 0

    def add(self, first: int, last: int, count: int, size_bytes: int = 0) -> None:
        """Add `count` records that lie somewhere in first..last."""
        self.first_id = min(self.first_id, first) if self.told else first
        self.last_id = max(self.last_id, last)
        self.count += count
        self.bytes += size_bytes

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


def pick_oldest(
    runs: Sequence[StoredRun], excess_bytes: int, keep: Callable[[int, int], bool]
) -> list[StoredRun]:
    """Return the oldest runs that free `excess_bytes` together, without those to keep."""
    picked: list[StoredRun] = []
    for run in runs:
        if excess_bytes <= 0:
            break
        if not keep(run.id, run.last_id):
            picked.append(run)
            excess_bytes -= run.sealed_bytes + ROW_OVERHEAD_BYTES
    return picked


def pick_expired(
    runs: Sequence[StoredRun], wall_s: int, age_max_s: dict[int, int], keep: Callable[[int, int], bool]
) -> list[StoredRun]:
    """Return the runs older than their kind's age limit. A run whose time is not known never expires."""
    return [
        run
        for run in runs
        if run.at_s is not None
        and run.kind in age_max_s
        and wall_s - run.at_s > age_max_s[run.kind]
        and not keep(run.id, run.last_id)
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
