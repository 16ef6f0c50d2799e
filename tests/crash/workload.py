"""Drives a recorded spool through a seeded life and notes around every call what must be on flash.

`Life` is the model: a plain dict of what was committed and not acknowledged. It decides what a reopened
spool may hold; the spool's own bookkeeping is never asked.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from unittest import mock

import msgspec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tbox.clock import next_start
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, Draft, Level, Now, Record, record_id
from tbox.spool import seal
from tbox.spool.seal import KEY_BYTES, write_key
from tbox.spool.starts import highest_start_seen
from tbox.spool.store import Spool, SpoolSettings
from tests.crash.disk import Image
from tests.crash.recorder import Recorder

QUOTA_BYTES = 80 * 1024


class Violation(AssertionError):
    """The spool broke a promise."""


@dataclass(frozen=True)
class StartFacts:
    """What is known of one start: the highest id surely committed, the highest ever minted."""

    floor: int | None = None
    ceiling: int | None = None
    clean: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What must be found if the power goes now."""

    rows: dict[int, Record] = field(default_factory=dict)
    starts: dict[int, StartFacts] = field(default_factory=dict)  # those whose start row is on flash
    told: frozenset[int] = frozenset()  # starts whose end was told by a record that was acknowledged
    issued: int = 0  # highest start number ever returned
    previous_of: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # start record id -> starts it tells of
    run_of: dict[int, int] = field(default_factory=dict)  # id -> first id of the run it was committed in


@dataclass(frozen=True)
class Span:
    """One call: operations begin..end of the log, and what holds once it has returned."""

    begin: int
    end: int
    after: Snapshot


def settings(**changes: Any) -> SpoolSettings:
    plain: dict[str, Any] = {
        "quota_bytes": QUOTA_BYTES, "ballast": False, "live_records_max": 6, "backlog_records_s": 1_000_000,
        "backlog_bytes_s": 1 << 30,
    }  # fmt: skip
    return SpoolSettings(**{**plain, **changes})


class WatchedAead:
    """AES-GCM that never lets one nonce seal two texts under one key."""

    _sealed: ClassVar[dict[tuple[bytes, bytes], tuple[bytes, bytes]]] = {}

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key)

    def encrypt(self, nonce: bytes, body: bytes, aad: bytes) -> bytes:
        if self._sealed.setdefault((self._key, nonce), (body, aad)) != (body, aad):
            raise Violation(f"nonce {nonce.hex()} seals two texts")
        return self._aead.encrypt(nonce, body, aad)

    def decrypt(self, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
        return self._aead.decrypt(nonce, sealed, aad)


@contextlib.contextmanager
def watched_nonces() -> Iterator[None]:
    """Watch every seal made within."""
    WatchedAead._sealed.clear()
    with mock.patch.object(seal, "AESGCM", WatchedAead):
        yield


class Minter:
    """Gives records their ids as the codec does; the payload is the body and some filler."""

    def __init__(self, start: int, rng: random.Random) -> None:
        self.start = start
        self.count = 0
        self.minted: list[Record] = []
        self._rng = rng

    def __call__(self, draft: Draft) -> Record:
        self.count += 1
        body = {**draft.body, "fill": self._rng.randbytes(draft.body.get("fill", 0))}
        payload = msgspec.msgpack.encode(body)
        record = Record(record_id(self.start, self.count), draft.kind, int(draft.level), payload)
        self.minted.append(record)
        return record


class Life:
    """One power cycle: from an image of the medium to wherever the log is cut."""

    def __init__(self, directory: str, image: Image, base: Snapshot, seed: int) -> None:
        self.rng = random.Random(seed)
        self.recorder = Recorder(directory)
        self.image = image
        self.spans: list[Span] = []
        self.now = Now(0)
        self._directory = directory
        self._state = base
        self._run_of = base.run_of
        self._in_flight: list[Record] = []
        self._acked: set[int] = set()

    # --- calls ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _span(self) -> Iterator[None]:
        begin = len(self.recorder.ops)
        yield
        self.spans.append(Span(begin, len(self.recorder.ops), self._state))

    def boot(self) -> None:
        recorder = self.recorder
        with self._span():
            seen = highest_start_seen(self._directory, recorder.connect, recorder.storage)
            start = next_start(recorder.storage, self._directory, seen=seen)
            self._state = replace(self._state, issued=start)
        self.minter = Minter(start, self.rng)
        self.ledger = Ledger()
        with self._span():
            self.spool = Spool.open(
                self._directory, settings(), start=start, mint=self.minter, now=self.now, ledger=self.ledger,
                connect=recorder.connect, storage=recorder.storage, random=self.rng.randbytes,
            )  # fmt: skip
            self._state = replace(self._state, starts={**self._state.starts, start: StartFacts()})
        self._open: dict[int, Record] = {}
        self._in_flight = []
        previous = self.spool.previous
        told = [previous.start, *(one.start for one in previous.earlier)] if previous else []
        first = self.append(Draft("event", Level.INFO, 0, {"event": "start", "previous": told}))
        self._state = replace(self._state, previous_of={**self._state.previous_of, first.id: tuple(told)})

    def append(self, draft: Draft) -> Record:
        record = self.minter(draft)
        self._open[record.id] = record
        self.spool.append([record])
        self._minted()
        return record

    def append_some(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((1, 2, 4, 6, 12))):
            alarm = rng.random() < 0.08
            fill = rng.choice((20, 20, 150, 600, 2500))
            kind, level = ("alarm", Level.ALARM) if alarm else ("telemetry", Level.INFO)
            self.append(Draft(kind, level, 0, {"fill": fill}))

    def offer(self) -> None:
        offered = self.spool.offer(self.now, self.rng.randint(1, 12))
        self._in_flight += offered

    def ack(self) -> None:
        """Acknowledge some of what is in flight, in any order."""
        self.rng.shuffle(self._in_flight)
        cut = self.rng.randint(0, len(self._in_flight))
        acked, self._in_flight = self._in_flight[:cut], self._in_flight[cut:]
        self.spool.ack([record.id for record in acked])
        ids = {record.id for record in acked}
        self._acked |= ids
        for one in ids:
            self._open.pop(one, None)

    def drain_all(self) -> None:
        """The link is good for once: everything is sent and acknowledged."""
        while offered := self.spool.offer(self.now, 50):
            self._in_flight += offered
            ids = {record.id for record in self._in_flight}
            self.spool.ack(ids)
            self._acked |= ids
            self._in_flight = []
            for one in ids:
                self._open.pop(one, None)
        self.tick()

    def requeue(self) -> None:
        self.spool.requeue()
        self._in_flight = []

    def tick(self) -> None:
        minted = len(self.minter.minted)
        with self._span():
            self.spool.tick(self.now)
            self._settle(self.minter.minted[minted:])

    def close(self) -> None:
        minted = len(self.minter.minted)
        start = self.minter.start
        with self._span():
            self.spool.tick(self.now)
            self._settle(self.minter.minted[minted:])
        with self._span():
            self.spool.close(self.now, clean=True, ledger_totals=self.ledger.snapshot())
            facts = replace(self._state.starts[start], clean=True)
            self._state = replace(self._state, starts={**self._state.starts, start: facts})

    def ask_for_rotation(self) -> None:
        """Put a new device key beside the old one; the next boot takes it into use."""
        with self._span():
            key_file = f"{self._directory}/device.key"
            write_key(self.recorder.storage, f"{key_file}.next", self.rng.randbytes(KEY_BYTES))

    def run(self, steps: int) -> None:
        """Live through `steps` random calls; a third of the lives end with nothing left on flash."""
        self.boot()
        for _ in range(steps):
            self.now = Now(self.now.mono_ns + 200 * NS_PER_MS)
            what = self.rng.random()
            if what < 0.36:
                self.append_some()
            elif what < 0.50:
                self.offer()
            elif what < 0.62:
                self.ack()
            elif what < 0.65:
                self.requeue()
            elif what < 0.95:
                self.tick()
            elif what < 0.97:
                self.drain_all()
            else:
                if self.rng.random() < 0.5:
                    self.ask_for_rotation()
                self.close()
                self.boot()
            self.ledger.check()
        if self.rng.random() < 1 / 3:
            self.drain_all()

    # --- the model ------------------------------------------------------------------------------------

    def _minted(self) -> None:
        start = self.minter.start
        facts = replace(self._state.starts[start], ceiling=record_id(start, self.minter.count))
        self._state = replace(self._state, starts={**self._state.starts, start: facts})

    def _settle(self, told: list[Record]) -> None:
        """A tick has returned: what was open is committed, what was acknowledged or dropped is gone."""
        self._note_runs(told)
        for record in told:
            self._open[record.id] = record
        acked = self._acked
        rows = {**self._state.rows, **self._open}
        newest = max(self._open, default=None)
        rows = {one: record for one, record in rows.items() if one not in acked}
        rows = self._without_dropped(rows, told)
        start = self.minter.start
        facts = self._state.starts[start]
        if newest is not None:
            facts = replace(facts, floor=max(facts.floor or 0, newest))
        facts = replace(facts, ceiling=record_id(start, self.minter.count))
        told_of = {s for one in acked for s in self._state.previous_of.get(one, ())}
        self._state = replace(
            self._state, rows=rows, starts={**self._state.starts, start: facts},
            told=self._state.told | told_of,
        )  # fmt: skip
        self._open = {}
        self._acked = set()

    def _note_runs(self, told: list[Record]) -> None:
        """What the tick committed went to flash in runs; each is evicted whole or not at all."""
        committed = [record for one, record in sorted(self._open.items()) if one not in self._acked]
        for portion in (committed, told):
            for alarms in (False, True):
                before: Record | None = None
                for record in (one for one in portion if one.is_alarm == alarms):
                    follows = before is not None and record.id == before.id + 1 and (
                        record.kind, record.level) == (before.kind, before.level)  # fmt: skip
                    self._run_of[record.id] = self._run_of[before.id] if before and follows else record.id
                    before = record

    def _without_dropped(self, rows: dict[int, Record], told: list[Record]) -> dict[int, Record]:
        """Take a drop record at its word: the oldest runs of which nothing is in flight, counted exactly."""
        flying = {self._run_of.get(record.id, record.id) for record in self._in_flight}
        for record in told:
            body = msgspec.msgpack.decode(record.payload)
            if body.get("event") != "drop":
                continue
            loose = [one for one in rows if rows[one].kind != "event" and self._run_of[one] not in flying]
            by_age = sorted(loose, key=lambda one: (rows[one].is_alarm, one))
            lost = by_age[: body["count"]]
            if (min(lost), max(lost)) != (body["first_id"], body["last_id"]):
                raise Violation(f"the drop record {body} does not tell what the oldest records are")
            if sum(len(rows[one].payload) for one in lost) != body["bytes"]:
                raise Violation(f"the drop record {body} counts other bytes")
            rows = {one: row for one, row in rows.items() if one not in lost}
        return rows
