"""The medium refuses: every write full, every read failing, bits flipped, files cut short, two owners."""

from __future__ import annotations

import errno
import itertools
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import apsw
import msgspec
import pytest

from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, Record, TimeQuality
from tbox.spool.flash import PAGE_BYTES, Flash
from tbox.spool.keyring import Keyring
from tbox.spool.lock import SpoolLocked
from tbox.spool.look import stat
from tbox.spool.policy import Lane
from tbox.spool.store import Spool
from tests.crash.filler import records_of_tick
from tests.crash.recorder import Recorder
from tests.crash.workload import Minter, settings


class Medium:
    """Lets the n-th operation of a kind fail, and then all of that kind until it is mended."""

    def __init__(self, kind: str, at: int, error: Callable[[bool], Exception]) -> None:
        self.kind = kind
        self.left = at
        self.broken = False
        self.mended = False
        self._error = error

    def __call__(self, what: str, path: str) -> None:
        if what != self.kind or self.mended:
            return
        self.left -= 1
        if self.left < 0:
            self.broken = True
            raise self._error("spool.db" in path)


def _full(database: bool) -> Exception:
    return apsw.FullError("disk full") if database else OSError(errno.ENOSPC, "No space left on device")


def _failing(database: bool) -> Exception:
    return apsw.IOError("disk I/O error") if database else OSError(errno.EIO, "Input/output error")


def _telemetry(minter: Minter, n: int, fill: int = 300) -> list[Record]:
    return [minter(Draft("telemetry", Level.INFO, 0, {"fill": fill})) for _ in range(n)]


def _drain(spool: Spool, now: Now) -> dict[int, Record]:
    got: dict[int, Record] = {}
    while batch := spool.offer(now, 100):
        got |= {record.id: record for record in batch}
    return got


def _events(records: dict[int, Record], key: str) -> list[dict[str, Any]]:
    bodies = [msgspec.msgpack.decode(r.payload) for r in records.values() if r.kind in ("event", "alarm")]
    return [body for body in bodies if key in body]


def _life_with_fault(directory: Path, medium: Medium) -> None:
    """Append, tick, offer and ack through a fault and its mending; everything must come out in the end."""
    recorder = Recorder(str(directory))
    minter = Minter(1, random.Random(1))
    ledger = Ledger()
    recorder.fault = medium
    spool = Spool.open(
        str(directory), settings(), start=1, mint=minter, now=Now(0), ledger=ledger,
        connect=recorder.connect, storage=recorder.storage, random=random.Random(2).randbytes,
    )  # fmt: skip
    acked: set[int] = set()
    for second in range(1, 12):
        now = Now(second * NS_PER_S)
        spool.append(_telemetry(minter, 3))
        spool.tick(now)
        offered = spool.offer(now, 2)
        spool.ack([record.id for record in offered])
        acked |= {record.id for record in offered}
        ledger.check()
    medium.mended = True
    for second in range(60, 65):
        spool.tick(Now(second * NS_PER_S))
    assert spool.stat()["state"] == "flash"
    spool.requeue()
    got = _drain(spool, Now(100 * NS_PER_S))
    assert set(got) | acked == {record.id for record in minter.minted}
    assert not set(got) & acked
    if medium.broken and spool.stat()["state"] == "flash":
        alarms = [body["event"] for body in _events(got, "alarm")]
        assert alarms in ([], ["raise", "clear"]) or acked  # told, unless the retry within the tick did it
    spool.close(Now(101 * NS_PER_S), clean=True, ledger_totals={})
    ledger.check()


def _count(directory: Path, kind: str) -> int:
    medium = Medium(kind, 1 << 30, _full)
    directory.mkdir()
    _life_with_fault(directory, medium)
    return (1 << 30) - medium.left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"), [("write", _full), ("write", _failing), ("sync", _failing), ("read", _failing)]
)
def test_a_medium_that_refuses_at_any_operation_loses_nothing(
    tmp_path: Path, kind: str, error: Callable[[bool], Exception]
) -> None:
    total = _count(tmp_path / "dry", kind)
    assert total > 10
    for at in range(total):
        directory = tmp_path / str(at)
        directory.mkdir()
        _life_with_fault(directory, Medium(kind, at, error))


def _salvage_with_fault(directory: Path, files: dict[str, bytes], medium: Medium) -> dict[int, Record]:
    """Salvage a damaged spool through a fault of the new file and its mending; return what came back."""
    _put(files, directory)
    recorder, ledger, minter = Recorder(str(directory)), Ledger(), Minter(2, random.Random(2))
    spool = Spool.open(
        str(directory), settings(quota_bytes=1 << 24), start=2, mint=minter, now=Now(0), ledger=ledger,
        connect=recorder.connect, storage=recorder.storage,
    )  # fmt: skip
    assert spool.stat()["salvaging"]
    recorder.fault = lambda what, path: medium(what, path) if path.endswith(("spool.db", "-wal")) else None
    for second in range(1, 12):
        spool.tick(Now(second * NS_PER_S))
        ledger.check()
    medium.mended = True
    got: dict[int, Record] = {}
    for second in range(100, 160):
        spool.tick(Now(second * NS_PER_S))
        got |= _drain(spool, Now(second * NS_PER_S))
        ledger.check()
    assert spool.stat()["state"] == "flash" and not spool.stat()["salvaging"]
    assert spool.depth == len(got)
    spool.close(Now(200 * NS_PER_S), clean=False, ledger_totals={})
    return {one: record for one, record in got.items() if record.start == 1}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "error"), [("write", _full), ("write", _failing), ("sync", _failing)])
def test_a_medium_that_refuses_during_a_salvage_loses_nothing_more(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]],
    monkeypatch: pytest.MonkeyPatch, kind: str, error: Callable[[bool], Exception],
) -> None:  # fmt: skip
    monkeypatch.setattr("tbox.spool.rescue.RUNS_PER_TICK", 20)
    files, _made = stopped
    content = bytearray(files["spool.db"])
    leaf = [at for at in range(PAGE_BYTES, len(content), PAGE_BYTES) if content[at] == 13][-1]
    content[leaf : leaf + PAGE_BYTES] = bytes(PAGE_BYTES)
    files = {**files, "spool.db": bytes(content)}
    dry = Medium(kind, 1 << 30, error)
    good = _salvage_with_fault(tmp_path / "dry", files, dry)
    total = (1 << 30) - dry.left
    assert len(good) > 100 and total > 5
    for at in range(0, total, max(1, total // 25)):
        assert _salvage_with_fault(tmp_path / str(at), files, Medium(kind, at, error)) == good


def test_what_cannot_be_looked_up_during_a_salvage_is_asked_for_again(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, _made = stopped
    content = bytearray(files["spool.db"])
    leaf = [at for at in range(PAGE_BYTES, len(content), PAGE_BYTES) if content[at] == 13][-1]
    content[leaf : leaf + PAGE_BYTES] = bytes(PAGE_BYTES)
    files = {**files, "spool.db": bytes(content)}
    good = _salvage_with_fault(tmp_path / "dry", files, Medium("read", 1 << 30, _failing))
    holds, asked = Flash.holds, itertools.count(1)

    def failing(self: Flash, lane: Lane, one: int) -> bool:
        if next(asked) in (7, 40):
            raise _failing_read()
        return holds(self, lane, one)

    monkeypatch.setattr(Flash, "holds", failing)
    assert _salvage_with_fault(tmp_path / "hard", files, Medium("read", 1 << 30, _failing)) == good


def _failing_read() -> sqlite3.Error:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return error


def test_a_full_disk_ends_in_ram_with_an_alarm_and_comes_back(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path))
    minter, ledger = Minter(1, random.Random(1)), Ledger()
    spool = Spool.open(
        str(tmp_path), settings(ram_bytes_max=64 * 1024, quota_bytes=1 << 24), start=1, mint=minter,
        now=Now(0), ledger=ledger, connect=recorder.connect, storage=recorder.storage,
    )  # fmt: skip
    medium = Medium("write", 0, _full)
    recorder.fault = medium
    lost_at = 0
    for second in range(1, 200):
        spool.append(_telemetry(minter, 2, fill=1000))
        spool.tick(Now(second * NS_PER_S))
        ledger.check()
        if not lost_at and ledger.snapshot()["spool"]["dropped"]:
            lost_at = second
    assert spool.stat()["state"] == "ram" and lost_at
    assert spool.stat()["open_bytes"] <= 64 * 1024
    recorder.fault = None
    spool.tick(Now(300 * NS_PER_S))
    spool.tick(Now(301 * NS_PER_S))
    assert spool.stat()["state"] == "flash"
    got = _drain(spool, Now(400 * NS_PER_S))
    drops = _events(got, "cause")
    minted = {record.id for record in minter.minted}
    missing = minted - set(got)
    assert {body["cause"] for body in drops} == {"ram"}
    assert sum(body["count"] for body in drops) == len(missing)
    assert all(any(b["first_id"] <= one <= b["last_id"] for b in drops) for one in missing)
    assert [body["event"] for body in _events(got, "alarm")] == ["raise", "clear"]
    spool.close(Now(401 * NS_PER_S), clean=True, ledger_totals={})


def _filled(directory: Path, ticks: int, end: str) -> dict[int, Record]:
    """Leave a spool as a clean stop would, or as a kill (its log not checkpointed)."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.crash.filler", str(directory), str(ticks), end]
    subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
    minter = Minter(1, random.Random(1))
    return {record.id: record for _ in range(ticks) for record in records_of_tick(minter)}


def _reopened(directory: Path, start: int = 2) -> tuple[dict[int, Record], list[dict[str, Any]], Spool]:
    """Open after damage and let the salvage run; return what comes out and what it says was dropped."""
    ledger = Ledger()
    spool = Spool.open(
        str(directory), settings(quota_bytes=1 << 24), start=start, mint=Minter(start, random.Random(6)),
        now=Now(0), ledger=ledger,
    )  # fmt: skip
    got: dict[int, Record] = {}
    for second in range(1, 40):
        spool.tick(Now(second * NS_PER_S))
        got |= _drain(spool, Now(second * NS_PER_S))
        ledger.check()
    return {one: r for one, r in got.items() if r.start == 1}, _events(got, "cause"), spool


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[int, Record]]:
    directory = tmp_path_factory.mktemp("stopped")
    made = _filled(directory, 60, "stop")
    return {path.name: path.read_bytes() for path in directory.iterdir()}, made


def _put(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_page_costs_what_was_on_it_and_says_so(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], seed: int
) -> None:
    files, made = stopped
    rng = random.Random(seed)
    content = bytearray(files["spool.db"])
    page = rng.randrange(1, len(content) // PAGE_BYTES)
    content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = rng.randbytes(PAGE_BYTES)
    _put({**files, "spool.db": bytes(content)}, tmp_path)
    got, drops, spool = _reopened(tmp_path)
    assert all(made[one] == record for one, record in got.items())
    missing = set(made) - set(got)
    assert len(missing) < len(made) // 2
    assert all(any(b["first_id"] <= one <= b["last_id"] for b in drops) for one in missing), (missing, drops)
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})
    assert not [path.name for path in tmp_path.iterdir() if "damaged" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24))
def test_flipped_bits_never_yield_a_wrong_record(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], seed: int
) -> None:
    files, made = stopped
    rng = random.Random(100 + seed)
    content = bytearray(files["spool.db"])
    for _ in range(3):
        bit = rng.randrange(len(content) * 8)
        content[bit // 8] ^= 1 << bit % 8
    _put({**files, "spool.db": bytes(content)}, tmp_path)
    got, _drops, spool = _reopened(tmp_path)
    assert all(made[one] == record for one, record in got.items())
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


def _flip(files: dict[str, bytes], sealed: bytes) -> dict[str, bytes]:
    """Flip one bit of a stopped spool's file in the middle of this sealed body."""
    content = bytearray(files["spool.db"])
    # The first overflow page holds the body from where the leaf's part of it ends: look for any part.
    at = next(
        content.find(sealed[n : n + 64])
        for n in range(len(sealed) // 2, len(sealed), 64)
        if sealed[n : n + 64] in content
    )
    content[at] ^= 4
    return {**files, "spool.db": bytes(content)}


def _sealed(directory: Path, number: int) -> tuple[int, int, bytes]:
    """Return the first id, the length and the sealed body of a routine run of a stopped spool."""
    with closing(sqlite3.connect(directory / "spool.db")) as db:
        row = db.execute("SELECT id, n, sealed FROM routine ORDER BY id LIMIT 1 OFFSET ?", (number,))
        return cast("tuple[int, int, bytes]", row.fetchone())


@pytest.mark.slow
def test_a_bit_flipped_in_the_text_of_the_schema_loses_no_record(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]]
) -> None:
    files, made = stopped
    _put(files, tmp_path)
    with closing(sqlite3.connect(tmp_path / "spool.db")) as db:
        texts = [row[0].encode() for row in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]
    rng = random.Random(4)
    for number in range(120):
        content = bytearray(files["spool.db"])
        text = rng.choice(texts)
        at = content.index(text) + rng.randrange(len(text))
        content[at] ^= 1 << rng.randrange(8)
        directory = tmp_path / str(number)
        _put({**files, "spool.db": bytes(content)}, directory)
        got, _drops, spool = _reopened(directory)
        assert got == made, (number, at)
        assert spool.stat()["state"] == "flash" and not spool.stat()["dropped"]
        spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


# Magic, page size, what may be written, reserved bytes, fractions, schema format, the version and its sum.
@pytest.mark.parametrize("at", [0, 15, 16, 17, 18, 19, 20, 21, 23, 47, 60, 61, 62, 63, 71])
def test_a_bit_flipped_in_the_header_costs_no_record(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], at: int
) -> None:
    files, made = stopped
    content = bytearray(files["spool.db"])
    content[at] ^= 1
    _put({**files, "spool.db": bytes(content)}, tmp_path)
    got, _drops, spool = _reopened(tmp_path)
    assert got == made and spool.stat()["state"] == "flash" and not spool.stat()["dropped"]
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


@pytest.mark.parametrize("left", [0, 16, 100, 1024])
def test_a_first_page_that_is_gone_costs_no_record(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], left: int
) -> None:
    files, made = stopped
    content = bytearray(files["spool.db"])
    content[left:PAGE_BYTES] = random.Random(left).randbytes(PAGE_BYTES - left)
    _put({**files, "spool.db": bytes(content)}, tmp_path)
    got, _drops, spool = _reopened(tmp_path)
    assert got == made and not spool.stat()["dropped"]
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


@pytest.mark.parametrize("partly_acked", [False, True])
def test_a_flipped_bit_in_a_body_costs_its_run_and_no_other(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], partly_acked: bool
) -> None:
    files, made = stopped
    _put(files, tmp_path)
    if partly_acked:
        spool = Spool.open(
            str(tmp_path), settings(quota_bytes=1 << 24, live_records_max=1), start=2,
            mint=Minter(2, random.Random(5)), now=Now(0), ledger=Ledger(),
        )  # fmt: skip
        routine = [record for record in _drain(spool, Now(0)).values() if not record.is_alarm]
        acked = {record.id for record in routine[2:5]}
        spool.ack(acked)
        spool.close(Now(1), clean=True, ledger_totals={})
        made = {one: record for one, record in made.items() if one not in acked}
    first, n, sealed = _sealed(tmp_path, 0)
    held = [made[one] for one in range(first, first + n) if one in made]
    _put(_flip({path.name: path.read_bytes() for path in tmp_path.iterdir()}, sealed), tmp_path)
    start = 3 if partly_acked else 2
    got, drops, spool = _reopened(tmp_path, start)
    assert got == {one: record for one, record in made.items() if record not in held}
    (drop,) = drops
    assert (drop["count"], drop["first_id"], drop["last_id"]) == (len(held), held[0].id, held[-1].id)
    assert drop["bytes"] == (0 if partly_acked else sum(len(record.payload) for record in held))
    assert spool.stat()["dropped"] == {"damage": len(held)}
    spool.ack(got)
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})
    assert not [path.name for path in tmp_path.iterdir() if "damaged" in path.name]
    assert _sealed(tmp_path, 0)[:2] == (first, n)  # its bytes stay, for a person
    with closing(Flash(str(tmp_path / "spool.db"), sqlite3.connect, 1 << 24)) as flash:
        said = stat(flash)
    assert said["routine"]["spoiled_runs"] == 1 and said["records"] == 1  # the drop record
    again, _drops, spool = _reopened(tmp_path, start + 1)
    assert not again and not spool.stat()["dropped"]  # told once
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


def test_a_spoiled_run_that_is_partly_in_flight_is_told_once_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minter, ledger = Minter(1, random.Random(1)), Ledger()
    spool = Spool.open(
        str(tmp_path), settings(quota_bytes=1 << 24, live_records_max=1), start=1, mint=minter, now=Now(0),
        ledger=ledger,
    )  # fmt: skip
    spool.append(_telemetry(minter, 10))
    spool.tick(Now(1))
    monkeypatch.setattr(Keyring, "unseal", lambda _self, _run: None)
    (sent,) = _drain(spool, Now(2))  # the newest, from RAM
    spool.tick(Now(3))
    assert sent == minter.minted[-1].id and not spool.stat()["dropped"]
    spool.ack([sent])
    spool.tick(Now(4))
    ledger.check()
    assert spool.stat()["dropped"] == {"damage": 9} and spool.depth == 1  # the drop record
    assert ledger.snapshot()["spool"]["out"] == 1
    spool.close(Now(6), clean=True, ledger_totals={})


def test_what_is_spoiled_leaves_when_the_cap_needs_its_room(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]]
) -> None:
    files, _made = stopped
    _put(files, tmp_path)
    first, n, sealed = _sealed(tmp_path, 0)
    _put(_flip(files, sealed), tmp_path)
    minter, ledger = Minter(2, random.Random(2)), Ledger()
    spool = Spool.open(
        str(tmp_path), settings(quota_bytes=1 << 18), start=2, mint=minter, now=Now(0), ledger=ledger
    )
    spool.ack(_drain(spool, Now(0)))
    for second in range(1, 60):
        spool.append(_telemetry(minter, 9, fill=1000))
        spool.tick(Now(second * NS_PER_S))
        ledger.check()
    drops = _events({record.id: record for record in minter.minted}, "cause")
    assert [drop["count"] for drop in drops if drop["cause"] == "damage"] == [n]
    spool.close(Now(61 * NS_PER_S), clean=True, ledger_totals={})
    assert _sealed(tmp_path, 0)[0] > first


def test_a_salvage_counts_what_the_readable_but_changed_runs_held(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]]
) -> None:
    files, made = stopped
    _put(files, tmp_path)
    first, n, sealed = _sealed(tmp_path, 3)
    content = bytearray(_flip(files, sealed)["spool.db"])
    leaves = [at for at in range(PAGE_BYTES, len(content), PAGE_BYTES) if content[at] == 13]
    content[leaves[-1] : leaves[-1] + PAGE_BYTES] = bytes(PAGE_BYTES)  # that one SQLite notices
    _put({**files, "spool.db": bytes(content)}, tmp_path)
    got, drops, spool = _reopened(tmp_path)
    assert not set(got) & set(range(first, first + n)) and len(got) > len(made) // 2
    assert sum(drop["count"] for drop in drops) >= n
    assert spool.stat()["dropped"]["damage"] == sum(drop["count"] for drop in drops)
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


def test_a_bit_flipped_in_what_is_noted_as_gone_repeats_records_but_loses_none(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]]
) -> None:
    files, made = stopped
    for bit in range(8 * 8):
        directory = tmp_path / str(bit)
        _put(files, directory)
        spool = Spool.open(
            str(directory), settings(quota_bytes=1 << 24), start=2, mint=Minter(2, random.Random(5)),
            now=Now(0), ledger=Ledger(),
        )  # fmt: skip
        routine = [record for record in _drain(spool, Now(0)).values() if not record.is_alarm]
        acked = {record.id for record in routine[2:5]}
        spool.ack(acked)
        spool.close(Now(1), clean=True, ledger_totals={})
        with closing(sqlite3.connect(directory / "spool.db")) as db:
            (gone,) = db.execute("SELECT gone FROM partly").fetchone()
            changed = bytearray(gone)
            changed[bit // 8] ^= 1 << bit % 8
            db.execute("UPDATE partly SET gone = ?", (bytes(changed),))
            db.commit()
        got, _drops, spool = _reopened(directory, 3)
        assert set(made) - acked <= set(got) <= set(made)
        spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


@pytest.mark.parametrize("size", [0, 1, 100, 1024, 5000, 50_000])
def test_a_truncated_file_opens_without_help(
    tmp_path: Path, stopped: tuple[dict[str, bytes], dict[int, Record]], size: int
) -> None:
    files, made = stopped
    _put({**files, "spool.db": files["spool.db"][:size]}, tmp_path)
    got, _drops, spool = _reopened(tmp_path)
    assert spool.stat()["state"] == "flash"
    assert all(made[one] == record for one, record in got.items())
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


def test_a_bit_flipped_in_the_log_loses_its_tail_and_shows_as_a_sequence_gap(tmp_path: Path) -> None:
    made = _filled(tmp_path, 30, "die")
    log = tmp_path / "spool.db-wal"
    content = bytearray(log.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    log.write_bytes(content)
    got, _drops, spool = _reopened(tmp_path)
    assert spool.previous is not None and spool.previous.last_committed_id is not None
    assert max(got) == spool.previous.last_committed_id < max(made)
    assert set(got) == {one for one in made if one <= max(got)}
    assert not spool.previous.clean
    spool.close(Now(50 * NS_PER_S), clean=True, ledger_totals={})


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    minter = Minter(1, random.Random(1))
    spool = Spool.open(str(tmp_path), settings(), start=1, mint=minter, now=Now(0), ledger=Ledger())
    with pytest.raises(SpoolLocked, match="stop it first"):
        Spool.open(str(tmp_path), settings(), start=2, mint=minter, now=Now(0), ledger=Ledger())
    spool.append(_telemetry(minter, 3))
    spool.tick(Now(1))
    assert len(_drain(spool, Now(2))) == 3
    spool.close(Now(3), clean=True, ledger_totals={})


@pytest.mark.parametrize("jump_ns", [-(10**18), 10**18, 0])
def test_a_clock_that_jumps_changes_no_order_and_loses_nothing(tmp_path: Path, jump_ns: int) -> None:
    minter, ledger = Minter(1, random.Random(1)), Ledger()
    spool = Spool.open(
        str(tmp_path), settings(age_max_h={"telemetry": 1}), start=1, mint=minter, now=Now(0), ledger=ledger
    )
    wall = 1_800_000_000 * NS_PER_S
    for second in range(20):
        spool.append(_telemetry(minter, 2))
        spool.tick(
            Now(
                second * NS_PER_S,
                wall + (jump_ns if second >= 10 else 0) + second * NS_PER_S,
                TimeQuality.NTP,
            )
        )
    got = _drain(spool, Now(30 * NS_PER_S))
    assert set(got) == {record.id for record in minter.minted}
    assert not ledger.snapshot()["spool"]["dropped"]
    spool.close(Now(31 * NS_PER_S), clean=True, ledger_totals={})


def test_records_past_their_age_leave_with_a_drop_record(tmp_path: Path) -> None:
    minter, ledger = Minter(1, random.Random(1)), Ledger()
    plain = settings(age_max_h={"telemetry": 1}, live_records_max=1)
    spool = Spool.open(str(tmp_path), plain, start=1, mint=minter, now=Now(0), ledger=ledger)
    wall = 1_800_000_000 * NS_PER_S
    old = _telemetry(minter, 10)
    spool.append([*old, minter(Draft("journey", Level.INFO, 0, {}))])
    for second in range(0, 2 * 3600, 300):
        spool.tick(Now(second * NS_PER_S, wall + second * NS_PER_S, TimeQuality.NTP))
    got = _drain(spool, Now(2 * 3600 * NS_PER_S))
    (body,) = _events(got, "cause")
    assert body["cause"] == "age" and body["count"] == 10
    assert (body["first_id"], body["last_id"]) == (old[0].id, old[-1].id)
    assert [record.kind for record in got.values()] == ["event", "journey"]
    ledger.check()
    spool.close(Now(2 * 3600 * NS_PER_S), clean=True, ledger_totals={})
