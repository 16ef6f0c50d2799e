"""A damaged spool file is put aside and its rows are fetched back one by one. Never writes to that file.

Putting aside is two renames, log first, and can be cut between them: `finish_setting_aside` ends it. A scan
stops at a damaged page, so what a scan cannot reach is looked up id by id.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tbox.durable import Storage
from tbox.spool.flash import FILE_NAME, Connect, Row
from tbox.spool.policy import LANES, Lane
from tbox.spool.schema import Connection

DAMAGED_NAME = f"{FILE_NAME}.damaged-"
LOG_SUFFIX = "-wal"
SCAN_ROWS = 64
# Ids looked up one by one around one damaged place: a page holds a few rows. It bounds one tick's work.
LOOKUPS_MAX = 4096
# A seek behind the damage goes this far at most: ids of one start are a 32-bit counter.
SEEK_IDS_MAX = 1 << 40


def set_aside(storage: Storage, directory: str, tag: int) -> str:
    """Rename a damaged database and its log; return the new name. Raises OSError."""
    taken = storage.listdir(directory)
    number = next(n for n in range(1 << 16) if f"{DAMAGED_NAME}{tag}.{n}" not in taken)
    name = f"{DAMAGED_NAME}{tag}.{number}"
    if storage.exists(f"{directory}/{FILE_NAME}{LOG_SUFFIX}"):
        storage.rename(f"{directory}/{FILE_NAME}{LOG_SUFFIX}", f"{directory}/{name}{LOG_SUFFIX}")
    storage.rename(f"{directory}/{FILE_NAME}", f"{directory}/{name}")
    storage.fsync_dir(directory)
    return name


def finish_setting_aside(storage: Storage, directory: str) -> list[str]:
    """End what a cut has interrupted; return the names of all files put aside, oldest first."""
    names = storage.listdir(directory)
    aside = {name.removesuffix(LOG_SUFFIX) for name in names if name.startswith(DAMAGED_NAME)}
    for name in aside:
        log = f"{FILE_NAME}{LOG_SUFFIX}"
        if name not in names and FILE_NAME in names:
            storage.rename(f"{directory}/{FILE_NAME}", f"{directory}/{name}")
            storage.fsync_dir(directory)
        elif f"{name}{LOG_SUFFIX}" not in names and FILE_NAME not in names and log in names:
            storage.rename(f"{directory}/{log}", f"{directory}/{name}{LOG_SUFFIX}")
            storage.fsync_dir(directory)
    return sorted(aside)


def remove_aside(storage: Storage, directory: str, name: str) -> None:
    """Delete a file put aside whose rows are safe again: the log first, so that no log is left alone."""
    for path in (f"{directory}/{name}{LOG_SUFFIX}", f"{directory}/{name}"):
        if storage.exists(path):
            storage.unlink(path)
            storage.fsync_dir(directory)


class Lost(NamedTuple):
    """Ids that could not be read: at most `records` of them between first and last."""

    first: int
    last: int
    records: int


@dataclass
class Found:
    """A portion of what came back. done: the lane's last portion."""

    lane: Lane
    rows: list[Row] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    upto: int = 0
    done: bool = False


def salvage(path: str, connect: Connect, after: Callable[[Lane], int]) -> Iterator[Found]:
    """Yield what can be read of a damaged file, portion by portion, each lane in order of id.

    after: the id up to which a lane was salvaged before. A file that cannot be opened at all yields one
    Lost over everything.
    """
    try:
        db = connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        for lane in LANES:
            yield Found(lane, lost=[Lost(1, (1 << 63) - 1, 0)], done=True)
        return
    try:
        for lane in LANES:
            yield from _salvage_lane(db, lane, after(lane))
            yield Found(lane, done=True)
    finally:
        with contextlib.suppress(sqlite3.Error):
            db.close()


def _salvage_lane(db: Connection, lane: Lane, after: int) -> Iterator[Found]:
    highest = _highest(db, lane)
    while True:
        try:
            rows = _rows(db, lane, "id > ? ORDER BY id LIMIT ?", after, SCAN_ROWS)
        except sqlite3.Error:
            found = _around_damage(db, lane, after, highest)
            yield found
            if found.done:
                return
            after = found.upto
            continue
        if not rows:
            return
        after = rows[-1].id
        yield Found(lane, rows, upto=after)


def _highest(db: Connection, lane: Lane) -> int | None:
    """Return the last id of a table, None when the way to it is damaged."""
    with contextlib.suppress(sqlite3.Error):
        row = db.execute(f"SELECT id FROM {lane.name} ORDER BY id DESC LIMIT 1").fetchone()
        return int(row[0]) if row else 0
    return None


def _around_damage(db: Connection, lane: Lane, after: int, highest: int | None) -> Found:
    """Get past a damaged place: row by row up to it, then id by id to where a scan goes on again."""
    near = _one_by_one(db, lane, after)
    if near:
        return Found(lane, near, upto=near[-1].id)
    beyond = _seek(db, lane, after)
    stop = after + LOOKUPS_MAX if beyond is None else min(max(beyond, after + 2), after + LOOKUPS_MAX)
    end = beyond is None and (highest is None or highest < stop)
    found = Found(lane, upto=max(stop, beyond or 0) - 1, done=end)
    failed: list[int] = []
    for one in range(after + 1, stop):
        try:
            found.rows += _rows(db, lane, "id = ? LIMIT ?", one, 1)
        except sqlite3.Error:
            failed.append(one)
    if failed:
        found.lost.append(Lost(failed[0], found.upto if beyond else failed[-1], len(failed)))
    return found


def _one_by_one(db: Connection, lane: Lane, after: int) -> list[Row]:
    """Scan row by row as far as the damage lets it."""
    rows: list[Row] = []
    with contextlib.suppress(sqlite3.Error):
        while len(rows) < SCAN_ROWS and (found := _rows(db, lane, "id > ? ORDER BY id LIMIT ?", after, 1)):
            rows += found
            after = rows[-1].id
    return rows


def _seek(db: Connection, lane: Lane, after: int) -> int | None:
    """Return the nearest id behind the damage that a scan can start from; None when there is none."""
    step = 1
    while step < SEEK_IDS_MAX:
        try:
            if rows := _rows(db, lane, "id >= ? ORDER BY id LIMIT ?", after + step, 1):
                return rows[0].id
        except sqlite3.Error:
            pass
        step += 1 if step < SCAN_ROWS else step
    return None


def _rows(db: Connection, lane: Lane, where: str, first: int, limit: int) -> list[Row]:
    sql = f"SELECT id, kind, level, at, sealed FROM {lane.name} WHERE sealed IS NOT NULL AND {where}"
    return [Row(*row) for row in db.execute(sql, (first, limit)).fetchall()]
