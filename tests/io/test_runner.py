"""The spool's thread gives out ids in the order of appending, answers the uplink, and tells when it dies."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from tbox.clock import SystemClock
from tbox.health import Heart
from tbox.ledger import Ledger
from tbox.model import Draft, Level, Now, Record
from tbox.record.codec import Minter
from tbox.spool.runner import SpoolRunner
from tbox.spool.store import Spool, SpoolSettings
from tests.daemon import wait_for

CLOCK = SystemClock()


class Watched:
    """A real spool's runner, and the ids in the order in which they were appended."""

    def __init__(self, directory: Path) -> None:
        minter = Minter(1, "car", guard=nullcontext())
        self.ids: list[int] = []
        self.looks = 0
        self.spool = Spool.open(
            str(directory / "spool"), SpoolSettings(ballast=False), start=1, now=CLOCK.now(), ledger=Ledger(),
            mint=lambda draft: minter.mint(draft, CLOCK.now()), connect=sqlite3.connect,
        )  # fmt: skip

        def mint(drafts: Sequence[Draft], now: Now) -> list[Record]:
            return [minter.mint(draft, now) for draft in drafts]

        self.runner = SpoolRunner(
            self.spool,
            mint,
            self._kept,
            CLOCK.now,
            Heart("spool"),
            20,
        )

    def _kept(self, records: list[Record]) -> None:
        self.ids += [record.id for record in records]
        self.looks += not records


def drafts(n: int) -> list[Draft]:
    return [Draft("event", Level.INFO, CLOCK.mono_ns(), {"event": "x", "n": n}) for n in range(n)]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    watched.runner.start()
    yield watched
    watched.runner.stop()
    watched.spool.close(CLOCK.now(), clean=True, ledger_totals={})


def test_drafts_from_many_threads_reach_the_spool_in_the_order_of_their_ids(watched: Watched) -> None:
    def hand_over() -> None:
        for _ in range(50):
            watched.runner.keep(drafts(3), CLOCK.now())

    threads = [threading.Thread(target=hand_over) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for("all of them", lambda: len(watched.ids) == 600)
    assert watched.ids == [(1 << 32) + n for n in range(1, 601)]


def test_what_is_offered_and_acknowledged_leaves_and_what_is_requeued_comes_back(watched: Watched) -> None:
    watched.runner.keep(drafts(5), CLOCK.now())
    first = wait_for("an offer", lambda: watched.runner.offer(10))
    assert [record.counter for record in first] == [1, 2, 3, 4, 5]
    watched.runner.ack([record.id for record in first[:2]])
    watched.runner.requeue()
    again = list(itertools.chain.from_iterable(wait_for("the rest", lambda: [watched.runner.offer(10)])))
    while len(again) < 3:
        again += watched.runner.offer(10)
    assert sorted(record.counter for record in again) == [3, 4, 5]


def test_records_that_the_spool_itself_makes_are_told_of_after_the_tick(watched: Watched) -> None:
    def nothing_left() -> bool:
        return not watched.runner.offer(10) and not watched.runner.more

    wait_for("the end of what there is", nothing_left)
    looks = watched.looks
    own = Record((1 << 32) + 1, "event", Level.ALARM, b"{}")
    watched.runner.call(lambda spool: spool.append([own]))
    wait_for("a look", lambda: watched.looks > looks)
    assert watched.runner.offer(10) == [own]


def test_a_spool_that_is_too_busy_to_answer_may_have_more(watched: Watched) -> None:
    wait_for("the end of what there is", lambda: not watched.runner.offer(10) and not watched.runner.more)
    busy = threading.Event()
    asker = threading.Thread(target=lambda: watched.runner.call(lambda _: busy.wait()))
    asker.start()
    try:
        assert watched.runner.offer(10) == [] and watched.runner.more
    finally:
        busy.set()
        asker.join()


def test_a_spool_that_dies_is_told_and_stops_nobody(tmp_path: Path) -> None:
    watched = Watched(tmp_path)

    def fail(_records: list[Record]) -> None:
        raise RuntimeError("planted")

    watched.runner._kept = fail
    watched.runner.start()
    watched.runner.keep(drafts(1), CLOCK.now())
    wait_for("the failure", lambda: watched.runner.failure)
    assert watched.runner.offer(1) == []
    watched.runner.stop()
