"""What the spool decides about what is stored: sets of ids, lanes, what is evicted or expires, what is told.

A core: time comes in as a value, rows come in as values. It never reads a file, a clock or a payload.
"""

from __future__ import annotations

import bisect
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tbox.model import NS_PER_S, Now, Record, TimeQuality

# Evictions go this far below the cap, so that a full spool does not evict in every single tick.
EVICTION_SLACK_PERCENT = 1
# What a row costs beyond its sealed bytes: cell pointer, sizes, id, header, length, kind, level and time.
ROW_OVERHEAD_BYTES = 32
# The age limit waits this long after the wall clock was set or jumped, and calls this much a jump.
CLOCK_SETTLE_S = 600
CLOCK_JUMP_S = 60
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


class Lane(NamedTuple):
    """One of the two tables by priority."""

    name: str
    alarm: bool


ALARM, ROUTINE = Lane("alarm", True), Lane("routine", False)
LANES = (ALARM, ROUTINE)


def lane_of(record: Record) -> Lane:
    return ALARM if record.is_alarm else ROUTINE


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
