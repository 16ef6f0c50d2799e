"""Records in RAM as the runs that they will be on flash: the open tick, and what waits to be sent live.

A tick holds hundreds of records that follow one another. They are looked at once, when they are cut into
runs; from then on a whole run is handed on, sealed or let go at once. Nothing here decides or does IO.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from tbox.model import Record

# A run is lost whole when a bit of it is; beyond this many payload bytes a new one begins.
RUN_BYTES_MAX = 32 * 1024
RUN_RECORDS_MAX = 1024


class RamRun(NamedTuple):
    """Records of one kind and level with consecutive ids from `first` on. Never changed: queues share it."""

    first: int
    records: Sequence[Record]
    size_bytes: int  # of their payloads

    @property
    def last(self) -> int:
        return self.first + len(self.records) - 1

    def part(self, begin: int, end: int) -> RamRun:
        """Return the records at begin..end, end left out."""
        records = self.records[begin:end]
        return RamRun(self.first + begin, records, payload_bytes(records))

    def joined(self, after: RamRun) -> RamRun | None:
        """Return both as one run, None when they cannot be one."""
        mine, other = self.records[0], after.records[0]
        size_bytes = self.size_bytes + after.size_bytes
        n = len(self.records) + len(after.records)
        alike = mine.kind == other.kind and mine.level == other.level and self.last + 1 == after.first
        if not alike or size_bytes > RUN_BYTES_MAX or n > RUN_RECORDS_MAX:
            return None
        return RamRun(self.first, [*self.records, *after.records], size_bytes)


_first = itemgetter(0)


def payload_bytes(records: Iterable[Record]) -> int:
    return sum([len(record.payload) for record in records])


def runs_of(records: Sequence[Record]) -> Iterator[RamRun]:
    """Cut records into runs: consecutive ids of one kind and level, up to the limits of a run."""
    begin = size_bytes = next_id = level = 0
    kind = ""
    for at, record in enumerate(records):
        n_bytes = len(record.payload)
        if (
            record.id != next_id
            or record.level != level
            or record.kind != kind
            or size_bytes + n_bytes > RUN_BYTES_MAX
            or at - begin == RUN_RECORDS_MAX
        ):
            if at:
                yield RamRun(records[begin].id, records[begin:at], size_bytes)
            begin, size_bytes, next_id, level, kind = at, 0, record.id, record.level, record.kind
        next_id += 1
        size_bytes += n_bytes
    if records:
        yield RamRun(records[begin].id, records[begin:], size_bytes)


class RamQueue:
    """Runs in order of id, of which any ids can be taken out."""

    def __init__(self) -> None:
        self._runs: list[RamRun] = []
        self._n = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        """Return the number of records, not of runs."""
        return self._n

    def __iter__(self) -> Iterator[RamRun]:
        return iter(list(self._runs))

    def append(self, run: RamRun) -> None:
        """Add a run, as a rule behind the others; it grows the last one where both can be one."""
        if self._runs and run.first <= self._runs[-1].last:
            self.put_back(run.records)
            return
        joined = self._runs[-1].joined(run) if self._runs else None
        if joined is not None:
            self._runs[-1] = joined
        else:
            self._runs.append(run)
        self._n += len(run.records)
        self.size_bytes += run.size_bytes

    def put_back(self, records: Iterable[Record]) -> None:
        """Add records that belong before or between those that are here."""
        held = [record for run in self._runs for record in run.records]
        self._runs = list(runs_of(sorted([*held, *records], key=lambda record: record.id)))
        self._n = sum(len(run.records) for run in self._runs)
        self.size_bytes = sum(run.size_bytes for run in self._runs)

    def get(self, one: int) -> Record | None:
        at = bisect.bisect_right(self._runs, one, key=_first) - 1
        if at < 0 or one > self._runs[at].last:
            return None
        return self._runs[at].records[one - self._runs[at].first]

    def count(self, first: int, last: int) -> int:
        """Return how many of the ids first..last are here."""
        at = max(0, bisect.bisect_right(self._runs, first, key=_first) - 1)
        n = 0
        while at < len(self._runs) and self._runs[at].first <= last:
            n += max(0, min(last, self._runs[at].last) - max(first, self._runs[at].first) + 1)
            at += 1
        return n

    def remove(self, first: int, last: int) -> list[RamRun]:
        """Take out those of the ids first..last that are here, and return them."""
        removed: list[RamRun] = []
        at = max(0, bisect.bisect_right(self._runs, first, key=_first) - 1)
        while at < len(self._runs) and self._runs[at].first <= last:
            run = self._runs[at]
            begin, end = max(0, first - run.first), last + 1 - run.first
            if begin == 0 and end >= len(run.records):
                left = []
            elif begin < len(run.records):
                left = [part for part in (run.part(0, begin), run.part(end, sys.maxsize)) if part.records]
                run = run.part(begin, end)
            else:  # ends before `first`
                at += 1
                continue
            self._runs[at : at + 1] = left
            at += len(left)
            self._n -= len(run.records)
            self.size_bytes -= run.size_bytes
            removed.append(run)
        return removed

    def take(self, records_max: int, bytes_max: int = sys.maxsize) -> list[Record]:
        """Take the first records out, up to these limits; the last may go beyond bytes_max."""
        taken: list[Record] = []
        while self._runs and records_max > 0 and bytes_max > 0:
            run = self._runs[0]
            if len(run.records) > records_max or run.size_bytes > bytes_max:
                n = _fitting(run.records[:records_max], bytes_max)
                run, *left = [part for part in (run.part(0, n), run.part(n, sys.maxsize)) if part.records]
                self._runs[0:1] = left
            else:
                del self._runs[0]
            self._n -= len(run.records)
            self.size_bytes -= run.size_bytes
            taken += run.records
            records_max -= len(run.records)
            bytes_max -= run.size_bytes
        return taken


def _fitting(records: Sequence[Record], bytes_max: int) -> int:
    """Return how many of the first records reach bytes_max, all when they do not."""
    for n, record in enumerate(records, 1):
        bytes_max -= len(record.payload)
        if bytes_max <= 0:
            return n
    return len(records)
