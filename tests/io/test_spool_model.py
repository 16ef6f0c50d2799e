"""The spool against a plain Python list: whatever is done to it, it holds what the list holds."""

from __future__ import annotations

import random
import shutil
import tempfile

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, Record
from tbox.spool.store import Spool
from tests.crash.workload import Minter, settings


class SpoolAgainstList(RuleBasedStateMachine):
    """`held` is the list: everything appended and not yet acknowledged, in the order of appending."""

    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="tbox-model-")
        self.held: list[Record] = []
        self.flying: list[Record] = []
        self.seconds = 0
        self.start = 0
        self._open()

    def _open(self) -> None:
        self.start += 1
        self.minter = Minter(self.start, random.Random(self.start))
        self.ledger = Ledger()
        self.flying = []
        self.spool = Spool.open(
            self.directory, settings(quota_bytes=1 << 24, live_records_max=3), start=self.start,
            mint=self.minter, now=self._now(), ledger=self.ledger,
        )  # fmt: skip

    def _now(self) -> Now:
        self.seconds += 1
        return Now(self.seconds * NS_PER_S)

    @rule(n=st.integers(1, 8), alarm=st.booleans(), fill=st.sampled_from([0, 100, 1100, 5000]))
    def append(self, n: int, alarm: bool, fill: int) -> None:
        kind, level = ("alarm", Level.CRITICAL) if alarm else ("telemetry", Level.WARNING)
        records = [self.minter(Draft(kind, level, 0, {"fill": fill})) for _ in range(n)]
        self.spool.append(records)
        self.held += records
        assert self.spool.wants_commit or not alarm

    @rule()
    def tick(self) -> None:
        self.spool.tick(self._now())
        assert not self.spool.wants_commit

    @rule(room=st.integers(0, 12))
    def offer(self, room: int) -> None:
        offered = self.spool.offer(self._now(), room)
        waiting = [record for record in self.held if record not in self.flying]
        assert len(offered) <= room and bool(offered) == bool(room and waiting)  # no live waits for backlog
        assert all(record in waiting for record in offered)
        alarms = [record.is_alarm for record in offered]
        assert alarms == sorted(alarms, reverse=True)
        assert sum(alarms) == min(room, sum(record.is_alarm for record in waiting))
        self.flying += offered

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        acked = data.draw(st.lists(st.sampled_from(self.flying), unique=True)) if self.flying else []
        self.spool.ack([record.id for record in acked])
        self.flying = [record for record in self.flying if record not in acked]
        self.held = [record for record in self.held if record not in acked]

    @rule()
    def ack_what_nobody_sent(self) -> None:
        self.spool.ack([self.start << 32 | 0xFFFF_FFFF])

    @rule()
    def link_dies(self) -> None:
        self.spool.requeue()
        self.flying = []

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        highest = self.minter.minted[-1].id if self.minter.minted else None
        self.spool.close(self._now(), clean=clean, ledger_totals={"n": self.start})
        before = self.start
        self._open()
        previous = self.spool.previous
        assert previous is not None and previous.start == before and previous.clean == clean
        if clean:
            assert previous.last_committed_id == highest and previous.ledger == {"n": before}

    @invariant()
    def counts_are_exact(self) -> None:
        self.ledger.check()
        assert self.spool.depth == len(self.held)

    def teardown(self) -> None:
        self.spool.requeue()
        got: list[Record] = []
        while batch := self.spool.offer(self._now(), 50):
            got += batch
        assert sorted(r.id for r in got) == [r.id for r in sorted(self.held, key=lambda r: r.id)]
        assert {r.id: r for r in got} == {r.id: r for r in self.held}
        self.spool.close(self._now(), clean=True, ledger_totals={})
        shutil.rmtree(self.directory)


TestSpoolAgainstList = pytest.mark.slow(SpoolAgainstList.TestCase)
TestSpoolAgainstList.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
