"""A spool in memory for the uplink's tests: a real SpoolPort that keeps books, and ways to break one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from tbox.model import Draft, Level, Now, Record
from tbox.record.codec import Minter

NOW = Now(1_000, 1_790_000_000_000_000_000)


class MemorySpool:
    """Offers in id order; what is in flight is offered again, under its old id, after a requeue."""

    more = True  # tests put records into it that it does not tell of

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.waiting: deque[Record] = deque(records)
        self.in_flight: dict[int, Record] = {}
        self.acked: list[int] = []
        self.offered: list[int] = []
        self.requeues = 0

    def offer(self, room: int) -> list[Record]:
        records = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.in_flight |= {record.id: record for record in records}
        self.offered += [record.id for record in records]
        return records

    def ack(self, ids: Sequence[int]) -> None:
        for number in ids:
            del self.in_flight[number]
            self.acked.append(number)

    def requeue(self) -> None:
        self.requeues += 1
        self.waiting.extendleft(sorted(self.in_flight.values(), key=lambda record: -record.id))
        self.in_flight.clear()

    @property
    def empty(self) -> bool:
        return not self.waiting and not self.in_flight


class AcksOnOffer(MemorySpool):
    """Planted bug: deletes what it hands out, before any PUBACK."""

    def offer(self, room: int) -> list[Record]:
        records = super().offer(room)
        self.in_flight.clear()
        return records

    def ack(self, ids: Sequence[int]) -> None:
        self.acked += ids


class ForgetsInFlight(MemorySpool):
    """Planted bug: when a link dies, what was in flight on it is not offered again."""

    def requeue(self) -> None:
        self.in_flight.clear()


class NumbersAnew(MemorySpool):
    """Planted bug: what is sent again gets new ids."""

    def __init__(self, records: Sequence[Record], renumber: Callable[[Record], Record]) -> None:
        super().__init__(records)
        self._renumber = renumber

    def requeue(self) -> None:
        again = [self._renumber(record) for record in self.in_flight.values()]
        self.in_flight.clear()
        self.waiting.extendleft(again)


def minter(start: int = 1) -> Minter:
    return Minter(start, "vehicle", guard=nullcontext())


def a_start(source: Minter, n: int, previous: dict[str, Any] | None = None) -> list[Record]:
    """Return a whole start: its start record, n of telemetry, its stop record."""
    event = {"event": "start", "start": source.start, "previous": previous}
    records = [source.mint(Draft("event", Level.INFO, 0, event), NOW)]
    records += [source.mint(Draft("telemetry", Level.INFO, i, {"n": i}), NOW) for i in range(n)]
    return [*records, source.mint(Draft("event", Level.INFO, n, {"event": "stop"}), NOW)]
