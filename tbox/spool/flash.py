"""The database file of a spool: pragmas, rows, one transaction at a time. Decides nothing, queues nothing.

Every method may raise sqlite3.Error; the caller knows what that means for the records. Only `execute` with
explicit BEGIN and COMMIT is used, so that a recording connection can stand in.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tbox.model import COUNTER_BITS
from tbox.spool import schema
from tbox.spool.policy import LANES, Lane, StoredRow
from tbox.spool.schema import Connection

# Small pages waste least beside what a commit writes anyway: the first page, an inner page, a half-full leaf.
PAGE_BYTES = 1024
# 4 MiB of log between checkpoints (1000 pages of SQLite's usual 4 KiB).
WAL_CHECKPOINT_PAGES = 4000
# Above the cap: what one transaction may add before its own evictions, and the tables' inner pages.
HARD_CAP_SPARE_BYTES = 4 * 1024 * 1024
FILE_NAME = "spool.db"
INSERT_ROWS = 50  # rows a statement; one statement per row costs twice the time
DELETE_ROWS_READ = 4096  # rows whose sizes are held at once while a range is deleted

# How SQLite lays a row on a leaf page (its file format, section 1.6): a payload above LOCAL_BYTES_MAX keeps
# a part of at least LOCAL_BYTES_MIN on the leaf and leaves the rest to overflow pages.
LEAF_BYTES = PAGE_BYTES - 8
LOCAL_BYTES_MAX = PAGE_BYTES - 35
LOCAL_BYTES_MIN = (PAGE_BYTES - 12) * 32 // 255 - 23
ROW_BYTES = 14  # record header, kind, level and time
CELL_BYTES = 10  # cell pointer, length and id

Connect = Callable[..., Connection]


class Row(NamedTuple):
    """A record as it stands on flash. sealed None: acknowledged, kept as the newest id that was committed."""

    id: int
    kind: int
    level: int
    at_s: int | None
    sealed: bytes | None


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


class Flash:
    """An open spool file. One connection, one thread."""

    def __init__(self, path: str, connect: Connect, quota_bytes: int) -> None:
        """Open or create the file. Raises sqlite3.Error, SpoolSchemaError."""
        self.path = path
        self._db = connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        self._newest: dict[Lane, int] = dict.fromkeys(LANES, 0)
        self._tombstone: dict[Lane, int | None] = dict.fromkeys(LANES)
        try:
            for pragma in pragmas(quota_bytes):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            schema.bring_up(self._db, path)
            self._look()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def _look(self) -> None:
        for lane in LANES:
            sql = f"SELECT id, sealed IS NULL FROM {lane.name} ORDER BY id DESC LIMIT 1"
            newest = self._db.execute(sql).fetchone()
            self._newest[lane] = newest[0] if newest else 0
            self._tombstone[lane] = newest[0] if newest and newest[1] else None

    # --- transaction ------------------------------------------------------------------------------

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo an open transaction; the newest ids are read anew, since a COMMIT may have half succeeded."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._look()

    def insert(self, lane: Lane, rows: Sequence[Row]) -> None:
        """Add rows; one that is there already stays as it is, so a commit in doubt may be repeated."""
        newest = max((row.id for row in rows), default=0)
        for at in range(0, len(rows), INSERT_ROWS):
            part = rows[at : at + INSERT_ROWS]
            values = ", ".join(["(?, ?, ?, ?, ?)"] * len(part))
            sql = f"INSERT OR IGNORE INTO {lane.name} (id, kind, level, at, sealed) VALUES {values}"
            self._db.execute(sql, [value for row in part for value in row])
        if newest > self._newest[lane]:
            self._newest[lane] = newest
            if self._tombstone[lane] is not None:
                self._db.execute(f"DELETE FROM {lane.name} WHERE id = ?", (self._tombstone[lane],))
                self._tombstone[lane] = None

    def delete(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Remove ids, except that the newest id of a table stays as an empty row.

        It is the only trace of how far a start had committed, and costs no page that is not written anyway.
        """
        for first, last in ranges:
            for lane in LANES:
                newest = self._newest[lane]
                if first > newest:
                    continue
                if newest <= last and self._tombstone[lane] != newest:
                    sql = f"UPDATE {lane.name} SET sealed = NULL, at = NULL WHERE id = ?"
                    self._db.execute(sql, (newest,))
                    self._tombstone[lane] = newest
                self._delete_rows(lane, first, min(last, newest - 1))

    def _delete_rows(self, lane: Lane, first: int, last: int) -> None:
        """Remove ids a leaf page's worth at a time, each emptied before it is removed.

        SQLite frees a page without writing it only if nothing on it was touched. Removing full rows one
        after the other makes it spread what is left over the next pages again and again: every page is
        written once more, only to be freed. Emptied rows leave room for a whole neighbour to move in, and
        the neighbour's own page is then freed untouched.
        """
        sizes = (
            f"SELECT id, length(sealed) FROM {lane.name} WHERE id BETWEEN ? AND ? ORDER BY id "
            f"LIMIT {DELETE_ROWS_READ}"
        )
        empty = f"UPDATE {lane.name} SET sealed = NULL, at = NULL WHERE id BETWEEN ? AND ?"
        remove = f"DELETE FROM {lane.name} WHERE id BETWEEN ? AND ?"
        while rows := self._db.execute(sizes, (first, last)).fetchall():
            for leaf in leaves(rows):
                if leaf[0] < leaf[1]:
                    self._db.execute(empty, leaf)
                self._db.execute(remove, leaf)
            first = rows[-1][0] + 1

    # --- rows -------------------------------------------------------------------------------------

    @property
    def newest_id(self) -> int | None:
        """The highest id ever committed that still leaves a trace."""
        return max(self._newest.values()) or None

    def newest(self, lane: Lane) -> int:
        return self._newest[lane]

    def read(self, lane: Lane, after: int, rows_max: int, bytes_max: int) -> list[Row]:
        """Return the next rows by id, tombstones included: at least one, at most about `bytes_max` sealed."""
        if after >= self._newest[lane]:
            return []
        sql = f"SELECT id, kind, level, at, sealed FROM {lane.name} WHERE id > ? ORDER BY id LIMIT ?"
        cursor = self._db.execute(sql, (after, rows_max))
        rows: list[Row] = []
        while bytes_max > 0 and (found := cursor.fetchone()) is not None:
            rows.append(Row(*found))
            bytes_max -= len(found[4] or b"")
        cursor.close()
        return rows

    def sizes(self, lane: Lane, after: int, rows_max: int) -> list[StoredRow]:
        """Return the next rows by id without reading what is sealed in them."""
        sql = (
            f"SELECT id, kind, at, length(sealed) FROM {lane.name} "
            "WHERE id > ? AND sealed IS NOT NULL ORDER BY id LIMIT ?"
        )
        return [StoredRow(*row) for row in self._db.execute(sql, (after, rows_max)).fetchall()]

    def newest_of(self, start: int) -> int | None:
        """Return the highest id of a start that is on flash."""
        found = [
            self._db.execute(
                f"SELECT max(id) FROM {lane.name} WHERE id > ? AND id < ?",
                (first_id(start), first_id(start + 1)),
            ).fetchone()[0]
            for lane in LANES
        ]
        return max((one for one in found if one is not None), default=None)

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

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Ask for something that no method names: the offline tools do."""
        return self._db.execute(sql, parameters).fetchall()
