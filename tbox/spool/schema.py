"""The spool's tables and how they grow. sqlite-utils makes and migrates them at open; nothing here sends.

The version in `user_version` is family * 1000 + step, its sum in `application_id`. Within a family steps
only add what an older release can ignore (a nullable column, a view), so an update that is rolled back still
opens its spool; a release does without the steps that are still to come, for none is made while it is on
trial. A spool of another family is refused with its data untouched.
"""

from __future__ import annotations

import contextlib
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from tbox.errors import TboxError
from tbox.imports import import_without

FAMILY = 1
FAMILY_SIZE = 1000
_VERSION_PRAGMAS = ("user_version", "application_id")
HEADER_BYTES = 100  # SQLite's file format, section 1.3

# What a kind is called on flash. Numbers are never reused; a new kind gets the next one.
KIND_CODES = {"telemetry": 1, "alarm": 2, "event": 3, "capture": 4, "journey": 5, "health": 6, "ota": 7}
KIND_NAMES = {code: kind for kind, code in KIND_CODES.items()}


class Cursor(Protocol):
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def close(self) -> None: ...


class Connection(Protocol):
    """What the spool uses of a database connection: sqlite3's own, or the crash tests' recording one."""

    @property
    def in_transaction(self) -> bool: ...
    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Cursor: ...
    def close(self) -> None: ...


class SpoolSchemaError(TboxError):
    """The spool was written by a release this one cannot follow."""


_PEOPLE_VIEW = """
SELECT id >> 32 AS start, id & 4294967295 AS counter, n AS records, priority,
       CASE kind {names} ELSE kind END AS kind, level, datetime(at, 'unixepoch') AS stored_at,
       length(sealed) - 16 - CASE n WHEN 1 THEN 0 ELSE 4 * n END AS payload_bytes, id
FROM (SELECT 'alarm' AS priority, id, n, kind, level, at, sealed FROM alarm
      UNION ALL SELECT 'routine', id, n, kind, level, at, sealed FROM routine)
WHERE sealed IS NOT NULL ORDER BY id
"""


def _lay_tables(db: Any) -> None:
    """Two tables of runs by priority, what of them is gone, starts with their wrapped keys, a view.

    A row is a run: the n records from id on, of one kind and level, committed and sealed together. Salvage:
    how far a damaged file was fetched, and the ids that left while they were still away in it.
    """
    run = {"id": int, "n": int, "kind": int, "level": int, "at": int, "sealed": bytes}
    for name in ("alarm", "routine"):
        db[name].create(run, pk="id")
    db["partly"].create({"id": int, "gone": bytes}, pk="id")
    db["away"].create({"first": int, "last": int}, pk="first")
    db["start"].create(
        {"start": int, "key_id": bytes, "wrapped": bytes, "clean": int, "last_id": int, "ledger": str},
        pk="start",
    )
    db["salvage"].create({"file": str, "alarm_after": int, "routine_after": int, "done": int}, pk="file")
    names = " ".join(f"WHEN {code} THEN '{kind}'" for kind, code in KIND_CODES.items())
    db.create_view("runs", _PEOPLE_VIEW.format(names=names))


_RUN_COLUMNS = ("id", "n", "kind", "level", "at", "sealed")
_START_COLUMNS = ("start", "key_id", "wrapped", "clean", "last_id", "ledger")
# Where `_lay_tables` puts each table, its root page and its columns. Steps only add columns behind them.
LAYOUT: dict[str, tuple[int, tuple[str, ...]]] = {
    "alarm": (2, _RUN_COLUMNS),
    "routine": (3, _RUN_COLUMNS),
    "partly": (4, ("id", "gone")),
    "away": (5, ("first", "last")),
    "start": (6, _START_COLUMNS),
    "salvage": (7, ("file", "alarm_after", "routine_after", "done")),
}


def fault(connection: Connection) -> str | None:
    """Return what of the tables is not as it was made, None when all is.

    SQLite believes what page 1 says of them: a flipped bit there hides a column, a key or a whole table.
    """
    try:
        return _fault(connection)
    except UnicodeDecodeError as error:  # SQLite quotes what it cannot parse
        return str(error)
    except sqlite3.OperationalError as error:
        if hasattr(error, "sqlite_errorcode"):
            raise
        return str(error)  # not SQLite's: a name is no text


def _fault(connection: Connection) -> str | None:
    roots = dict(
        connection.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'table'").fetchall()
    )
    for name, (root, columns) in LAYOUT.items():
        found = connection.execute(f"PRAGMA table_info({name})").fetchall()
        names = tuple(row[1] for row in found)[: len(columns)]
        key = [(row[1], row[2]) for row in found if row[5]]
        kind = "TEXT" if name == "salvage" else "INTEGER"
        if roots.get(name) != root or names != columns or key != [(columns[0], kind)]:
            return f"table {name} is not as it was made"
    return None


def lay_for_reading(connection: Connection) -> None:
    """Let the runs be read whatever page 1 says of them, in a transaction that must not be committed."""
    connection.execute("PRAGMA writable_schema=ON").fetchall()
    connection.execute("PRAGMA cache_spill=OFF").fetchall()  # nothing of it may reach the file
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # the first statement says what is wrong
    connection.execute("BEGIN")
    connection.execute("DELETE FROM sqlite_master")
    for name, made in _reading_tables():
        root = LAYOUT[name][0]
        connection.execute("INSERT INTO sqlite_master VALUES ('table', ?, ?, ?, ?)", (name, name, root, made))
    connection.execute("PRAGMA writable_schema=RESET").fetchall()


def header_fault(header: bytes, page_bytes: int) -> str | None:
    """Return what is wrong with the first bytes of a file; None for a new file or one cut in the making."""
    if len(header) < HEADER_BYTES or not any(header):
        return None
    magic = b"SQLite format 3\0" + page_bytes.to_bytes(2, "big")
    modes = header[18:20] in (b"\1\1", b"\2\2")  # rollback journal while in the making, then write-ahead log
    fixed = header[20:24] == b"\0\x40\x20\x20" and header[44:48] in (bytes(4), b"\0\0\0\4")
    return None if header.startswith(magic) and modes and fixed else "the header is not that of a spool"


def first_page(page_bytes: int, pages: int) -> bytes:
    """Return a page 1 under which the runs of a file of so many pages can be read."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"PRAGMA page_size={page_bytes}")
        for _, made in _reading_tables():
            db.execute(made)
        page = bytearray(db.serialize()[:page_bytes])
    page[18:20] = b"\2\2"  # SQLite's file format, section 1.3: write-ahead log; size in pages
    page[28:32] = pages.to_bytes(4, "big")
    return bytes(page)


def _reading_tables() -> Iterator[tuple[str, str]]:
    """Yield what is needed to read runs, in the order of the root pages: table and how it is made."""
    for name in ("alarm", "routine", "partly"):
        key, *others = LAYOUT[name][1]
        yield name, f"CREATE TABLE {name} ({key} INTEGER PRIMARY KEY, {', '.join(others)})"


Migration = Callable[[Any], None]

# One entry a released step, in order; entry 0 makes the tables. Never edited after a release, only added to.
MIGRATIONS: tuple[Migration, ...] = (_lay_tables,)


def version(connection: Connection) -> int:
    """Return `user_version`, or what it was when its sum in `application_id` was written."""
    found, told = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in _VERSION_PRAGMAS)
    if told not in (0, _sum(found)):
        mine = range(FAMILY * FAMILY_SIZE + 1, (FAMILY + 1) * FAMILY_SIZE)
        return next((one for one in mine if _sum(one) == told), found)
    return found


def _set_version(connection: Connection, new: int) -> None:
    for name, value in zip(_VERSION_PRAGMAS, (new, _sum(new)), strict=True):
        connection.execute(f"PRAGMA {name}={value}")


def _sum(number: int) -> int:
    return zlib.crc32(b"%d" % number) & 0x7FFF_FFFF


def bring_up(connection: Connection, where: str, *, migrate: bool = True) -> None:
    """Make the tables of a new spool or add the steps that an older one lacks, each in one transaction.

    migrate False: an older one stays as it is, and a new one is made as the first release made it.
    Raises SpoolSchemaError for a spool of a family this release does not know.
    """
    migrations = MIGRATIONS if migrate else MIGRATIONS[:1]
    found = version(connection)
    if found and found // FAMILY_SIZE != FAMILY:
        raise SpoolSchemaError(
            f"the spool has schema {found}, this release knows {FAMILY * FAMILY_SIZE + 1} and its family",
            where=where,
            mend="run the release that wrote it until it is drained, or name another directory",
        )
    done = found % FAMILY_SIZE or int(fault(connection) is None)  # a flipped bit may hide that they are made
    if done >= len(migrations):
        return
    import_without("sqlite_utils", "pandas")  # 40 MB that a daemon would never give back
    import sqlite_utils  # only when there is something to make: it is slow to import

    db = sqlite_utils.Database(cast(sqlite3.Connection, connection), recursive_triggers=False)
    for step in range(done, len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            migrations[step](db)
            _set_version(connection, FAMILY * FAMILY_SIZE + step + 1)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
