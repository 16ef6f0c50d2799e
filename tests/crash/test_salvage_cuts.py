"""The power goes while a damaged spool is salvaged: what was readable still comes back, once, or is told.

The recorded life opens a spool with a damaged page, salvages it tick by tick and acknowledges meanwhile.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Set
from pathlib import Path

import msgspec
import pytest

from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, Record
from tbox.spool import rescue
from tbox.spool.flash import PAGE_BYTES
from tbox.spool.store import Spool
from tests.crash.disk import Disk, Image, ImageStorage
from tests.crash.explore import memory_directory, no_meter, put, small_log
from tests.crash.recorder import Recorder
from tests.crash.workload import Minter, settings

VARIANTS_PER_OP = 3
IMAGES_PER_CUT = 6
TICKS_MAX = 80
TABLE_PAGES = (5, 13)  # SQLite's inner pages and leaves of tables; overflow pages begin with a zero
ROOMY = settings(quota_bytes=1 << 24)


def _open(directory: str, start: int, storage: ImageStorage | None = None) -> tuple[Spool, Minter, Ledger]:
    minter, ledger = Minter(start, random.Random(start)), Ledger()
    spool = Spool.open(directory, ROOMY, start=start, mint=minter, now=Now(0), ledger=ledger, storage=storage)
    return spool, minter, ledger


def _damaged(directory: str, seed: int) -> tuple[Image, dict[int, Record]]:
    """Leave a stopped spool, some of whose runs are partly gone, with half of a table's page overwritten.

    Beside it a bit of one sealed body is flipped, which only the seal can notice.
    """
    spool, minter, _ = _open(directory, 1)
    rng = random.Random(seed)
    for second in range(30):
        fill = rng.choice((10, 60, 300))
        spool.append([minter(Draft("telemetry", Level.INFO, 0, {"fill": fill})) for _ in range(8)])
        spool.append([minter(Draft("alarm", Level.ALARM, 0, {"fill": 20}))])
        spool.tick(Now(second * NS_PER_S))
    offered = spool.offer(Now(31 * NS_PER_S), 60)
    acked = {record.id for record in rng.sample(offered, 20)}
    spool.ack(acked)
    spool.close(Now(32 * NS_PER_S), clean=True, ledger_totals={})
    image = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    content = bytearray(image["spool.db"])
    pages = range(PAGE_BYTES, len(content), PAGE_BYTES)
    at = rng.choice([page for page in pages if content[page] in TABLE_PAGES])
    content[at : at + PAGE_BYTES // 2] = rng.randbytes(PAGE_BYTES // 2)
    overflow = rng.choice([page for page in pages if content[page] == 0])
    content[overflow + PAGE_BYTES // 2] ^= 1 << rng.randrange(8)
    made = {record.id: record for record in minter.minted if record.id not in acked}
    return {**image, "spool.db": bytes(content)}, made


def _salvage(spool: Spool, ledger: Ledger) -> Iterator[dict[int, Record]]:
    """Tick until nothing is left to salvage; yield what is offered after each tick."""
    for second in range(1, TICKS_MAX):
        spool.tick(Now(second * NS_PER_S))
        ledger.check()
        offered: dict[int, Record] = {}
        while batch := spool.offer(Now(second * NS_PER_S), 100):
            offered |= {record.id: record for record in batch}
        yield offered
        if not spool.stat()["salvaging"] and not offered:
            return
    raise AssertionError("the salvage does not end")


def _check(
    image: Image, directory: str, made: dict[int, Record], good: set[int], gone: Set[int], leaving: Set[int]
) -> None:
    """Open what a cut has left: every readable record comes back, what is missing is told.

    gone: acknowledged and committed; leaving: those and what the tick that was cut may have committed.
    """
    put({name: content for name, content in image.items() if name.startswith("spool.db")}, directory)
    spool, _, ledger = _open(directory, 3, ImageStorage(image, directory))
    got: dict[int, Record] = {}
    for offered in _salvage(spool, ledger):
        assert not offered.keys() & got.keys(), "offered twice"
        got |= offered
    assert spool.depth == len(got)
    spool.close(Now(TICKS_MAX * NS_PER_S), clean=False, ledger_totals={})
    mine = {one: record for one, record in got.items() if record.start == 1}
    assert all(made.get(one) == record for one, record in mine.items()), "back, or changed"
    assert not mine.keys() & gone, "acknowledged and back"
    assert good <= mine.keys() | leaving, "readable and lost"
    bodies = [msgspec.msgpack.decode(record.payload) for record in got.values() if record.kind == "event"]
    for one in made.keys() - mine.keys() - leaving:
        assert any(body["first_id"] <= one <= body["last_id"] for body in bodies), "lost in silence"


def _explore(seed: int, work: str, room: str, monkeypatch: pytest.MonkeyPatch) -> int:
    image, made = _damaged(work, seed)
    put(image, work)
    recorder = Recorder(work)
    monkeypatch.setattr(rescue, "RUNS_PER_TICK", 7)
    minter, ledger = Minter(2, random.Random(2)), Ledger()
    spool = Spool.open(
        work, ROOMY, start=2, mint=minter, now=Now(0), ledger=ledger, connect=recorder.connect,
        storage=recorder.storage,
    )  # fmt: skip
    good: set[int] = set()
    acked: set[int] = set()
    ticks = [(len(recorder.ops), frozenset[int]())]  # operations logged and ids gone when a tick had returned
    for offered in _salvage(spool, ledger):
        ticks.append((len(recorder.ops), frozenset(acked)))
        mine = [record.id for record in offered.values() if record.start == 1]
        good |= set(mine)
        acked |= set(mine[::3])
        spool.ack(mine[::3])
    ops = list(recorder.ops)
    spool.close(Now(TICKS_MAX * NS_PER_S), clean=False, ledger_totals={})
    account = ledger.snapshot()["spool"]
    assert spool.stat()["records"] == account["into"] - len(acked) - sum(account["dropped"].values())
    disk, rng, seen = Disk(image), random.Random(seed), set[int]()
    for cut in range(len(ops) + 1):
        done = bisect.bisect_right([logged for logged, _ in ticks], cut)
        gone = ticks[max(0, done - 1)][1]
        leaving = ticks[min(done, len(ticks) - 1)][1]
        for left in itertools.islice(disk.images(rng, VARIANTS_PER_OP), IMAGES_PER_CUT):
            key = hash((done, *sorted(left.items())))
            if key not in seen:
                seen.add(key)
                _check(left, room, made, good, gone, leaving)
        if cut < len(ops):
            disk.apply(ops[cut])
    return len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_cut_while_salvaging_loses_and_repeats_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with memory_directory() as work, memory_directory() as room, small_log(), no_meter():
        assert _explore(seed, work, room, monkeypatch) > 20
