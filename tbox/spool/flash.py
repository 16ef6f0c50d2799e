"""The database file of a spool: pragmas, runs, one transaction at a time. Decides nothing, queues nothing.

A row is a run of records that follow one another (`schema`). A run leaves as a whole; what of it is gone
before that stands in `partly`, which is written only for runs that are partly gone. Every method may raise
sqlite3.Error; the caller knows what that means for the records. Only `execute` with explicit BEGIN and
COMMIT is used, so that a recording connection can stand in.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import sys
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tbox.model import COUNTER_BITS
from tbox.spool import schema
from tbox.spool.policy import LANES, IdRanges, Lane, StoredRun, is_packed, packed, unpacked
from tbox.spool.ram import RUN_RECORDS_MAX
from tbox.spool.schema import Connection

# Small pages waste least beside what a commit writes anyway: the first page, an inner page, a half-full leaf.
PAGE_BYTES = 2048
# 4 MiB of log between checkpoints (1000 pages of SQLite's usual 4 KiB).
WAL_CHECKPOINT_PAGES = 2000
# Above the cap: what one transaction may add before its own evictions, and the tables' inner pages.
HARD_CAP_SPARE_BYTES = 4 * 1024 * 1024
FILE_NAME = "spool.db"
INSERT_ROWS = 50  # rows a statement; one statement per row costs twice the time
# More than a row adds to the pages in use beside what is sealed in it: two pages at each of eight levels.
ROW_GROWTH_BYTES = 16 * PAGE_BYTES

# How SQLite lays a row on a leaf page (its file format, section 1.6): a payload above LOCAL_BYTES_MAX keeps
# a part of at least LOCAL_BYTES_MIN on the leaf and leaves the rest to overflow pages.
LEAF_BYTES = PAGE_BYTES - 8
LOCAL_BYTES_MAX = PAGE_BYTES - 35
LOCAL_BYTES_MIN = (PAGE_BYTES - 12) * 32 // 255 - 23
ROW_BYTES = 15  # record header, length (of a single record), kind, level and time
CELL_BYTES = 10  # cell pointer, length and id

Connect = Callable[..., Connection]


class Damaged(sqlite3.DatabaseError):
    """A run is not what was sealed: the file is damaged, though SQLite has not noticed."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    sqlite_errorname = "SQLITE_CORRUPT"


class Run(NamedTuple):
    """Records id..last_id as they stand on flash.

    sealed None: all acknowledged, kept as the newest id that was committed. gone: what of it is gone.
    """

    id: int
    n: int
    kind: int
    level: int
    at_s: int | None
    sealed: bytes | None
    gone: bytes | None = None

    @property
    def last_id(self) -> int:
        return self.id + self.n - 1


def is_sound(run: Run | StoredRun) -> bool:
    """Whether a row's columns can be those of a run: damage may leave any type in any column."""
    level, sealed = (run.level, run.sealed) if isinstance(run, Run) else (0, None)
    return (
        isinstance(run.n, int)
        and isinstance(run.kind, int)
        and isinstance(level, int)
        and 1 <= run.n <= RUN_RECORDS_MAX
        and isinstance(sealed, bytes | None)
        and is_packed(run.gone, run.id)
    )


class StartRow(NamedTuple):
    """One start of the daemon: its wrapped data key and, once known, how it ended."""

    start: int
    key_id: bytes
    wrapped: bytes
    clean: int | None
    last_id: int | None
    ledger: str | None


def is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is broken, as against a full, read-only or failing medium."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_full(error: sqlite3.Error) -> bool:
    return _code(error) == sqlite3.SQLITE_FULL


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def header_fault(path: str) -> str | None:
    """Return what is wrong with the first bytes of a file, None when nothing is or there is none.

    SQLite takes a flipped bit here for another format, or for a file that must not be written.
    """
    with contextlib.suppress(OSError), Path(path).open("rb") as file:
        return schema.header_fault(file.read(schema.HEADER_BYTES), PAGE_BYTES)
    return None


def first_id(start: int) -> int:
    return start << COUNTER_BITS


def leaves(rows: Iterable[tuple[int, int | None]]) -> Iterator[tuple[int, int]]:
    """Cut rows (id, sealed bytes) in order of id into id ranges that fill about one leaf page each."""
    first, last, room_bytes = 0, 0, 0
    for one, sealed_bytes in rows:
        payload_bytes = (sealed_bytes or 0) + ROW_BYTES
        if payload_bytes > LOCAL_BYTES_MAX:
            local_bytes = LOCAL_BYTES_MIN + (payload_bytes - LOCAL_BYTES_MIN) % (PAGE_BYTES - 4)
            payload_bytes = local_bytes if local_bytes <= LOCAL_BYTES_MAX else LOCAL_BYTES_MIN
        cell_bytes = payload_bytes + CELL_BYTES
        if cell_bytes > room_bytes:
            if last:
                yield first, last
            first, room_bytes = one, LEAF_BYTES
        room_bytes -= cell_bytes
        last = one
    if last:
        yield first, last


def pragmas(quota_bytes: int) -> list[str]:
    """Return what every connection to a spool is told before anything else, in order."""
    pages_max = (quota_bytes + HARD_CAP_SPARE_BYTES) // PAGE_BYTES
    return [
        f"page_size={PAGE_BYTES}",
        "synchronous=FULL",  # NORMAL loses commits at a power cut
        "locking_mode=EXCLUSIVE",  # nobody else opens a live spool; also no shared-memory file
        "journal_mode=WAL",
        "secure_delete=OFF",  # Debian turns it on; rows are sealed anyway
        f"wal_autocheckpoint={WAL_CHECKPOINT_PAGES}",
        f"max_page_count={pages_max}",
        "temp_store=MEMORY",
        "trusted_schema=OFF",
        "cell_size_check=ON",
    ]


_COLUMNS = "r.id, r.n, r.kind, r.level, r.at, r.sealed, p.gone"
_SIZES = "r.id, r.n, r.kind, r.at, length(r.sealed), p.gone"
TABLES = "{} r LEFT JOIN partly p ON p.id = r.id"


@functools.cache
def _insert_sql(lane: Lane, rows: int) -> str:
    values = ", ".join(["(?, ?, ?, ?, ?, ?)"] * rows)
    return f"INSERT OR IGNORE INTO {lane.name} (id, n, kind, level, at, sealed) VALUES {values}"


class Flash:
    """An open spool file. One connection, one thread."""

    def __init__(self, path: str, connect: Connect, quota_bytes: int, *, migrate: bool = True) -> None:
        """Open or create the file; migrate: see `schema.bring_up`. Raises sqlite3.Error, SpoolSchemaError."""
        self.path = path
        wrong = header_fault(path)
        if wrong:
            raise Damaged(wrong)
        self._db = connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self._newest: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._tombstone: dict[Lane, int | None] = dict.fromkeys(LANES)
        self._used_bytes_max = sys.maxsize  # no more than this is in use
        try:
            for pragma in pragmas(quota_bytes):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            schema.bring_up(self._db, path, migrate=migrate)
            self._require_tables()
            self._look()
        except UnicodeDecodeError as error:  # SQLite quotes a damaged schema, and Python cannot read that
            self._db.close()
            raise Damaged(str(error)) from error
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def _require_tables(self) -> None:
        wrong = schema.fault(self._db)
        if wrong:
            raise Damaged(wrong)

    def _look(self) -> None:
        for lane in LANES:
            sql = f"SELECT {_SIZES} FROM {TABLES.format(lane.name)} ORDER BY r.id DESC LIMIT 1"
            found = self._db.execute(sql).fetchone()
            newest = StoredRun(*found) if found else None
            self._require(newest is None or is_sound(newest), 0)
            self._newest[lane] = newest.last_id if newest else 0
            self._tombstone[lane] = newest.id if newest and newest.sealed_bytes is None else None

    # --- transaction ------------------------------------------------------------------------------

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo an open transaction; the newest ids are read anew, since a COMMIT may have half succeeded."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._used_bytes_max = sys.maxsize
        self._look()

    def insert(self, lane: Lane, runs: Sequence[Run]) -> None:
        """Add runs; one that is there already stays as it is, so a commit in doubt may be repeated."""
        newest = max((run.last_id for run in runs), default=0)
        for at in range(0, len(runs), INSERT_ROWS):
            part = runs[at : at + INSERT_ROWS]
            self._db.execute(_insert_sql(lane, len(part)), [value for run in part for value in run[:6]])
            self._used_bytes_max += sum(len(run.sealed or b"") + ROW_GROWTH_BYTES for run in part)
        if newest > self._newest[lane]:
            self._newest[lane] = newest
            if self._tombstone[lane] is not None:
                self._db.execute(f"DELETE FROM {lane.name} WHERE id = ?", (self._tombstone[lane],))
                self._tombstone[lane] = None

    def delete(self, ids: IdRanges, kept: Collection[int] = ()) -> None:
        """Take records off the flash: whole runs are removed, of others it is noted what is gone.

        kept: runs, by their first ids, of which only that is noted even when nothing of them is left.

        The newest run of a table stays as an empty row. It is the only trace of how far a start had
        committed, and costs no page that is not written anyway.
        """
        for lane in LANES if ids else ():
            neighbours: list[StoredRun] = []  # whole runs with nothing left between them
            upto = 0
            for run in self._touched(lane, ids):
                gone = unpacked(run.gone, run.id)
                for first, last in ids.within(run.id, run.last_id):
                    gone.add(first, last)
                if len(gone) < run.n or run.id in kept:
                    self._note_gone(run, gone)
                    continue
                if run.gone is not None:
                    self._db.execute("DELETE FROM partly WHERE id = ?", (run.id,))
                if run.last_id == self._newest[lane]:
                    self._bury(lane, run.id)
                    continue
                if run.last_id > upto:
                    self._delete_rows(lane, neighbours)
                    neighbours.clear()
                    upto = ids.end_of(run.id)
                neighbours.append(run)
            self._delete_rows(lane, neighbours)

    def _touched(self, lane: Lane, ids: IdRanges) -> list[StoredRun]:
        """Return the runs that hold any of these ids, without what is sealed in them."""
        sql = (
            f"SELECT {_SIZES} FROM {TABLES.format(lane.name)} WHERE r.sealed IS NOT NULL AND r.id <= ? AND "
            f"r.id >= ifnull((SELECT max(id) FROM {lane.name} WHERE id <= ?), 0) ORDER BY r.id"
        )
        found: dict[int, StoredRun] = {}
        upto = 0
        for first, last in ids:
            if last <= upto or first > self._newest[lane]:
                continue
            for row in self._db.execute(sql, (last, first)).fetchall():
                run = StoredRun(*row)
                self._require(is_sound(run), run.id)
                if run.last_id >= first:
                    found[run.id] = run
                    upto = run.last_id
        return list(found.values())

    def _note_gone(self, run: StoredRun, gone: IdRanges) -> None:
        sql = "INSERT OR REPLACE INTO partly (id, gone) VALUES (?, ?)"
        gone_bytes = packed(gone, run.id)
        self._db.execute(sql, (run.id, gone_bytes))
        self._used_bytes_max += len(gone_bytes) + ROW_GROWTH_BYTES

    def _bury(self, lane: Lane, one: int) -> None:
        self._db.execute(f"UPDATE {lane.name} SET sealed = NULL, at = NULL WHERE id = ?", (one,))
        self._tombstone[lane] = one

    def _delete_rows(self, lane: Lane, runs: Sequence[StoredRun]) -> None:
        """Remove runs that stand side by side a leaf page's worth at a time, emptied before they are removed.

        SQLite frees a page without writing it only if nothing on it was touched. Removing full rows one
        after the other makes it spread what is left over the next pages again and again: every page is
        written once more, only to be freed. Emptied rows leave room for a whole neighbour to move in, and
        the neighbour's own page is then freed untouched.
        """
        empty = f"UPDATE {lane.name} SET sealed = NULL, at = NULL WHERE id BETWEEN ? AND ?"
        remove = f"DELETE FROM {lane.name} WHERE id BETWEEN ? AND ?"
        for leaf in leaves((run.id, run.sealed_bytes) for run in runs):
            if leaf[0] < leaf[1]:
                self._db.execute(empty, leaf)
            self._db.execute(remove, leaf)

    # --- runs -------------------------------------------------------------------------------------

    @property
    def newest_id(self) -> int | None:
        """The highest id ever committed that still leaves a trace."""
        return max(self._newest.values()) or None

    def newest(self, lane: Lane) -> int:
        return self._newest[lane]

    def read(self, lane: Lane, after: int, records_max: int, bytes_max: int) -> list[Run]:
        """Return the runs that hold the next ids, tombstones included, as many as reach a limit.

        The first may have begun at or before `after`. Raises Damaged when rows do not follow one another.
        """
        if after >= self._newest[lane] or bytes_max <= 0 or records_max <= 0:
            return []
        runs: list[Run] = []
        with contextlib.closing(self.rows(lane, after)) as rows:
            for run in rows:
                self._require(is_sound(run), run.id)
                if run.last_id <= after and not runs:
                    continue
                self._require(run.id > (runs[-1].last_id if runs else 0), run.id)
                runs.append(run)
                records_max -= run.last_id - max(after, run.id - 1)
                bytes_max -= len(run.sealed or b"")
                if bytes_max <= 0 or records_max <= 0:
                    break
        return runs

    def rows(self, lane: Lane, after: int) -> Generator[Run]:
        """Yield the rows from the one that may hold `after` on as they stand, whatever is in them."""
        sql = (
            f"SELECT {_COLUMNS} FROM {TABLES.format(lane.name)} "
            f"WHERE r.id >= ifnull((SELECT max(id) FROM {lane.name} WHERE id <= ?), 0) ORDER BY r.id"
        )
        with contextlib.closing(self._db.execute(sql, (after,))) as cursor:
            while (found := cursor.fetchone()) is not None:
                yield Run(*found)

    def sizes(self, lane: Lane, after: int, rows_max: int) -> list[StoredRun]:
        """Return the next runs that begin behind `after`, without what is sealed in them."""
        sql = (
            f"SELECT {_SIZES} FROM {TABLES.format(lane.name)} "
            "WHERE r.id > ? AND r.sealed IS NOT NULL ORDER BY r.id LIMIT ?"
        )
        runs = [StoredRun(*row) for row in self._db.execute(sql, (after, rows_max)).fetchall()]
        for run in runs:
            self._require(is_sound(run) and run.id > after, run.id)
            after = run.last_id
        return runs

    @staticmethod
    def _require(fact: bool, one: int) -> None:
        if not fact:
            raise Damaged(f"run {one} is no run, or out of order")

    def holds(self, lane: Lane, one: int) -> bool:
        """Whether a run begins at this id."""
        return self._db.execute(f"SELECT 1 FROM {lane.name} WHERE id = ?", (one,)).fetchone() is not None

    def newest_of(self, start: int) -> int | None:
        """Return the highest id of a start that is on flash."""
        sql = "SELECT id + n - 1 FROM {} WHERE id > ? AND id < ? ORDER BY id DESC LIMIT 1"
        limits = (first_id(start), first_id(start + 1))
        found = [self._db.execute(sql.format(lane.name), limits).fetchone() for lane in LANES]
        return max((row[0] for row in found if row), default=None)

    def oldest_start(self) -> int | None:
        """Return the oldest start that still has records on flash, and so needs its data key."""
        sql = "SELECT id FROM {} WHERE sealed IS NOT NULL ORDER BY id LIMIT 1"
        rows = [self._db.execute(sql.format(lane.name)).fetchone() for lane in LANES]
        return min((row[0] >> COUNTER_BITS for row in rows if row), default=None)

    # --- size -------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Return the pages in use, in bytes: what the cap is about. True inside a transaction too."""
        pages = self._pragma("page_count") - self._pragma("freelist_count")
        return pages * PAGE_BYTES

    def fits(self, bytes_max: int) -> bool:
        """Whether what is in use is within these bytes. Pages are counted only when it is not plain."""
        if self._used_bytes_max > bytes_max:
            self._used_bytes_max = self.used_bytes()
        return self._used_bytes_max <= bytes_max

    def file_bytes(self) -> int:
        """Return what the database file takes, free pages included (without the write-ahead log)."""
        return self._pragma("page_count") * PAGE_BYTES

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    # --- starts -----------------------------------------------------------------------------------

    def starts(self) -> list[StartRow]:
        sql = "SELECT start, key_id, wrapped, clean, last_id, ledger FROM start ORDER BY start"
        return [StartRow(*row) for row in self._db.execute(sql).fetchall()]

    def put_start(self, row: StartRow) -> None:
        sql = (
            "INSERT OR REPLACE INTO start (start, key_id, wrapped, clean, last_id, ledger) "
            "VALUES (?, ?, ?, ?, ?, ?)"
        )
        self._db.execute(sql, row)
        self._used_bytes_max = sys.maxsize

    def forget_starts(self, starts: Sequence[int]) -> None:
        for start in starts:
            self._db.execute("DELETE FROM start WHERE start = ?", (start,))

    # --- salvage ----------------------------------------------------------------------------------

    def salvaged(self, name: str) -> dict[Lane, int] | None:
        """Return how far a file put aside was salvaged; None when all of it is."""
        sql = "SELECT alarm_after, routine_after, done FROM salvage WHERE file = ?"
        row = self._db.execute(sql, (name,)).fetchone() or (0, 0, 0)
        return None if row[2] else dict(zip(LANES, row[:2], strict=True))

    def note_salvaged(self, name: str, after: dict[Lane, int], *, done: bool) -> None:
        sql = "INSERT OR REPLACE INTO salvage (file, alarm_after, routine_after, done) VALUES (?, ?, ?, ?)"
        self._db.execute(sql, (name, *(after[lane] for lane in LANES), int(done)))
        self._used_bytes_max = sys.maxsize

    def note_away(self, ids: IdRanges) -> None:
        """Note ids that left, in case their run is still in a file put aside."""
        for one in ids:
            self._db.execute("INSERT OR REPLACE INTO away (first, last) VALUES (?, ?)", one)
        self._used_bytes_max = sys.maxsize

    def away(self) -> IdRanges:
        ids = IdRanges()
        for first, last in self._db.execute("SELECT first, last FROM away").fetchall():
            ids.add(first, last)
        return ids

    def forget_away(self) -> None:
        self._db.execute("DELETE FROM away")

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Ask for something that no method names: the offline tools do."""
        return self._db.execute(sql, parameters).fetchall()
