"""Who is sent next: alarms, then live, then captures and backlog as a token bucket lets.

A core: time comes in as nanoseconds, stored records come through a reader. It never looks into a payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from tbox.model import NS_PER_S, Record
from tbox.spool.policy import ALARM, LANES, ROUTINE, IdRanges, Lane
from tbox.spool.ram import RamQueue, RamRun

# How many reads one call may make when what it reads turns out to be in flight or doomed.
READS_MAX = 4
# They wait with the backlog even while they are fresh: a capture is up to 400 records of 60 KiB, and what the
# vehicle tells meanwhile must not stand in line behind it.
PATIENT_KINDS = frozenset({"capture"})


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


# (lane, after this id, records at most, bytes at most) -> stored records in order of id, and the id read up
# to; the last run comes whole, so more may come than was asked for
Reader = Callable[[Lane, int, int, int], tuple[list[Record], int | None]]


class Drain:
    """Who is sent next: fresh alarms, stored alarms, live, then captures and backlog as the bucket lets.

    Live is what was not offered since it was appended and still is in RAM; the rest is read from flash in
    order of id, and only when there is nothing livelier to give out: nothing fresh waits for a read. Each run
    is read once per link: the cursor only moves back when the link died (`requeue`) or when live records had
    to leave RAM (`trim`).
    """

    def __init__(self, backlog_records: TokenBucket, backlog_bytes: TokenBucket) -> None:
        # In RAM and not offered since they were appended; patient: routine records of PATIENT_KINDS.
        self._alarms, self._live, self._patient = RamQueue(), RamQueue(), RamQueue()
        self._fresh = {ALARM: (self._alarms,), ROUTINE: (self._live, self._patient)}
        # Everything of a lane on flash up to here was offered, is fresh, or is gone.
        self._cursor: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._records = backlog_records
        self._bytes = backlog_bytes
        self.in_flight: dict[int, Lane] = {}
        self._again: dict[int, Lane] = {}  # was in flight when the link died; a late PUBACK still counts
        self.gone = IdRanges()  # acknowledged or evicted, and still on flash
        self.more = True  # whether the next offer may find something: the last did not see the end of all

    def append(self, run: RamRun) -> bool:
        """Take a new run; return whether to commit at once: it is of alarms, or of what led to one."""
        queue = self._queue_of(run.records[0])
        queue.append(run)
        self.more = True
        return queue is not self._live

    def _queue_of(self, record: Record) -> RamQueue:
        if record.is_alarm:
            return self._alarms
        return self._patient if record.kind in PATIENT_KINDS else self._live

    def _queues(self) -> Iterator[tuple[Lane, RamQueue]]:
        for lane, queues in self._fresh.items():
            for queue in queues:
                yield lane, queue

    def offer(self, mono_ns: int, room: int, read: Reader, bytes_max: int) -> list[Record]:
        """Return at most `room` records in drain order and mark them in flight."""
        before = dict(self._cursor)
        self.more = True
        out = self._fly(ALARM, self._alarms.take(room))
        out += self._take_stored(ALARM, room - len(out), bytes_max, read)
        out += self._fly(ROUTINE, self._live.take(room - len(out)))
        if out:
            return out
        tokens = int(min(room, self._records.available(mono_ns)))
        byte_tokens = int(self._bytes.available(mono_ns))
        if tokens > 0 and byte_tokens > 0:
            out = self._fly(ROUTINE, self._patient.take(tokens, byte_tokens))
            out = out or self._take_stored(ROUTINE, tokens, min(bytes_max, byte_tokens), read)
            self._records.take(len(out))
            self._bytes.take(sum(len(record.payload) for record in out))
            self.more = bool(out) or before != self._cursor
        return out

    def _take_stored(self, lane: Lane, room: int, bytes_max: int, read: Reader) -> list[Record]:
        """Take records from flash; the fresh ones of the lane went before, or there is no room."""
        assert room <= 0 or not any(self._fresh[lane])
        taken: list[Record] = []
        for _ in range(READS_MAX):
            if room <= 0 or bytes_max <= 0:
                break
            records, upto = read(lane, self._cursor[lane], room, bytes_max)
            if upto is None:
                break
            self._cursor[lane] = upto
            for number, record in enumerate(records):
                if room <= 0 or bytes_max <= 0:
                    self._cursor[lane] = records[number - 1].id
                    break
                if record.id in self.in_flight or record.id in self.gone:
                    continue
                taken.append(record)
                room -= 1
                bytes_max -= len(record.payload)
        return self._fly(lane, taken)

    def _fly(self, lane: Lane, records: list[Record]) -> list[Record]:
        self.in_flight.update(dict.fromkeys([record.id for record in records], lane))
        if self._again:
            for record in records:
                self._again.pop(record.id, None)
        return records

    def ack(self, ids: Iterable[int]) -> dict[Lane, list[int]]:
        """Take acknowledgements; return the ids by lane, in order, without those not held any more."""
        held: dict[Lane, list[int]] = {lane: [] for lane in LANES}
        for one in ids:
            lane = self.in_flight.pop(one, None)
            if lane is None:
                lane = self._again.pop(one, None)
                self._forget(one, one)
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
        return self.is_flying(first, last) or any(queue.count(first, last) for queue in self._fresh[lane])

    def requeue(self, in_open_tick: Callable[[int], Record | None]) -> None:
        """The link died: everything in flight is offered again, under its old id and in order of id."""
        back: list[Record] = []
        for one, lane in self.in_flight.items():
            self._again[one] = lane
            record = in_open_tick(one)
            if record is not None:
                back.append(record)
            else:
                self.rewind(lane, one)
        for _, queue in self._queues():
            queue.put_back([record for record in back if self._queue_of(record) is queue])
        self.more |= bool(self.in_flight)
        self.in_flight.clear()

    def trim(self, records_max: int, bytes_max: int) -> None:
        """Everything is on flash: let the oldest fresh records leave RAM; they become backlog."""
        for lane, queue in self._queues():
            if len(queue) > records_max or queue.size_bytes > bytes_max:
                leaving = queue.take(len(queue) - records_max)
                leaving += queue.take(len(queue), queue.size_bytes - bytes_max)
                self.rewind(lane, leaving[0].id)

    def drop(self, first: int, last: int) -> None:
        """These records will not be sent any more."""
        if self._again:
            for one in range(first, last + 1):
                self._again.pop(one, None)
        self._forget(first, last)

    def committed(self) -> None:
        """What was gone is off the flash now."""
        self.gone.clear()

    def rewind(self, lane: Lane, one: int) -> None:
        """A record with this id came to flash behind the cursor."""
        self.more = True
        self._cursor[lane] = min(self._cursor[lane], one - 1)

    def _forget(self, first: int, last: int) -> None:
        for _, queue in self._queues():
            queue.remove(first, last)
