"""A damaged spool file is put aside and its runs are fetched back one by one. Writes to no page of records.

Putting aside is two renames, log first, and can be cut between them: `finish_setting_aside` ends it. Both
tables are walked side by side in order of id, and only a run that unseals comes back. Of one that is
readable but changed it is told how many records it held; whatever other ids are missing are told as a range
without a count, since nobody can say any more whether they were acknowledged or lost.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tbox.durable import Storage
from tbox.spool import schema
from tbox.spool.flash import FILE_NAME, PAGE_BYTES, Connect, Run, header_fault, is_damage, is_sound
from tbox.spool.policy import LANES, Lane, is_packed
from tbox.spool.schema import Connection

DAMAGED_NAME = f"{FILE_NAME}.damaged-"
LOG_SUFFIX = "-wal"
# Ids tried one by one behind a damaged place, then in steps that double: a leaf page holds a few runs.
LOOKUPS_MAX = 4096
# A seek behind the damage goes this far at most: ids of one start are a 32-bit counter.
SEEK_IDS_MAX = 1 << 40
ID_MAX = (1 << 63) - 1


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
    """Delete a file put aside whose runs are safe again.

    Its log goes first and for good, whoever deleted it (SQLite does, when it closes the file): a log that is
    left alone looks like a cut between the two renames, and the new file would be put aside.
    """
    log = f"{directory}/{name}{LOG_SUFFIX}"
    if storage.exists(log):
        storage.unlink(log)
    storage.fsync_dir(directory)
    if storage.exists(f"{directory}/{name}"):
        storage.unlink(f"{directory}/{name}")
        storage.fsync_dir(directory)


class Found(NamedTuple):
    """A run that came back, or a range of ids (run None) of which nobody knows what was still held.

    whole False: the run is not what was sealed; only its length, and what of it is gone, can be believed.
    """

    lane: Lane
    run: Run | None
    first: int
    last: int
    whole: bool = True


Whole = Callable[[Run], bool]


def salvage(
    path: str, connect: Connect, after: Callable[[Lane], int], whole: Whole, *, mend: bool = False
) -> Iterator[Found]:
    """Yield what can be read of a damaged file and every gap in it, in order of id.

    after: the id up to which a lane was salvaged before. whole: whether a run is what was sealed. mend:
    whether the file's first page, which holds no record, may be replaced where nothing can be read without.
    A file that cannot be opened at all yields one gap over everything.
    """
    try:
        if mend and header_fault(path):
            _replace_first_page(path)
        try:
            db = _opened(path, connect)
        except sqlite3.Error as error:
            if not mend or not is_damage(error):
                raise
            _replace_first_page(path)
            db = _opened(path, connect)
    except (sqlite3.Error, OSError):
        yield Found(LANES[0], None, 1, ID_MAX)
        return
    try:
        lanes = [_salvage_lane(db, lane, after(lane), whole) for lane in LANES]
        yield from _with_gaps(heapq.merge(*lanes, key=lambda found: found.first), max(map(after, LANES)))
    finally:
        with contextlib.suppress(sqlite3.Error):
            db.close()


def _replace_first_page(path: str) -> None:
    with Path(path).open("r+b") as file:
        pages = file.seek(0, os.SEEK_END) // PAGE_BYTES
        if pages > 1:
            file.seek(0)
            file.write(schema.first_page(PAGE_BYTES, pages))


def _opened(path: str, connect: Connect) -> Connection:
    db = connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        try:
            wrong = schema.fault(db)
        except sqlite3.Error as error:
            wrong = str(error)
        if wrong:
            schema.lay_for_reading(db)
    except BaseException:
        db.close()
        raise
    return db


def _with_gaps(founds: Iterable[Found], upto: int) -> Iterator[Found]:
    """Add the gaps between good neighbours. What is before the first is a gap only where damage was seen."""
    upto_known = upto > 0
    for found in founds:
        if upto_known and found.first > upto + 1:
            yield Found(found.lane, None, upto + 1, found.first - 1)
        yield found
        upto, upto_known = max(upto, found.last), True


def _salvage_lane(db: Connection, lane: Lane, after: int, whole: Whole) -> Iterator[Found]:
    """Yield a lane's whole runs in order of id; where it is damaged, the range up to where it goes on.

    A table is walked from its beginning with one cursor as long as that goes, over what was salvaged before
    too: a look-up inside a damaged page may miss rows that a walk still passes.
    """
    first: int | None = 0
    while first is not None:
        doubtful = False  # something stood here that is not what was sealed
        changed: list[Run] = []  # of that, the runs whose length can be read
        try:
            for run in _walk(db, lane, first, after):
                if run.last_id <= after:
                    doubtful |= run.id > after or not run.n
                    continue
                if run.id <= after or not run.n or not whole(run):
                    if not first and not after:
                        after = max(0, run.id - 1)  # the table begins here
                    changed += [run] if run.n else []
                    doubtful = True
                    continue
                if doubtful:
                    yield from _gaps(lane, after + 1, run.id - 1, changed)
                yield Found(lane, run, run.id, run.last_id)
                after, doubtful, changed = run.last_id, False, []
            first = None
        except sqlite3.Error:
            doubtful, first = True, _seek(db, lane, after, whole)
        if doubtful:
            yield from _gaps(lane, after + 1, ID_MAX if first is None else first - 1, changed)


def _gaps(lane: Lane, first: int, last: int, changed: Sequence[Run]) -> Iterator[Found]:
    """Tell first..last, from where nothing came back: the changed runs in it, and what is between them."""
    ends = [run.id - 1 for run in changed[1:]] + [last]
    for run, end in zip(changed, ends, strict=False):
        end = min(run.last_id, end)
        if first <= run.id <= end:
            if first < run.id:
                yield Found(lane, None, first, run.id - 1)
            yield Found(lane, run._replace(n=end - run.id + 1), run.id, end, whole=False)
            first = end + 1
    if first <= last:
        yield Found(lane, None, first, last)


def _walk(db: Connection, lane: Lane, first: int, after: int) -> Iterator[Run]:
    """Yield the runs from an id on. A cursor that meets damage keeps back the row before it: ask for that."""
    sealed = "CASE WHEN id > ? THEN sealed ELSE x'' END"  # what was salvaged before is passed over unread
    sql = f"SELECT id, n, kind, level, at, {sealed} FROM {lane.name} WHERE id >= ? ORDER BY id"
    try:
        cursor = db.execute(sql, (after, first))
        while (row := cursor.fetchone()) is not None:
            yield from _run_of(db, row)
            first = row[0] + 1
    except sqlite3.Error:
        while (row := db.execute(f"{sql} LIMIT 1", (after, first)).fetchone()) is not None:
            yield from _run_of(db, row)
            first = row[0] + 1


def _run_of(db: Connection, row: Any) -> Iterator[Run]:
    """Yield the run in a row, if there is one; of no length when the row cannot be that of a run."""
    if row[5] is not None:
        run = Run(*row)
        yield run._replace(gone=_gone(db, run.id)) if is_sound(run) else Run(run.id, 0, 0, 0, None, b"")


def _gone(db: Connection, one: int) -> bytes | None:
    """Return what of a run is gone; where that cannot be read any more, all of it comes back.

    So a damaged page of `partly` repeats what was acknowledged of the runs on it, under the old ids: the
    only other choice is to lose what was not.
    """
    with contextlib.suppress(sqlite3.Error):
        row = db.execute("SELECT gone FROM partly WHERE id = ?", (one,)).fetchone()
        return row[0] if row and is_packed(row[0], one) else None
    return None


def _seek(db: Connection, lane: Lane, after: int, whole: Whole) -> int | None:
    """Return where the nearest whole run behind the damage begins; None when there is none."""
    sql = f"SELECT id, n, kind, level, at, sealed FROM {lane.name} WHERE id >= ? ORDER BY id LIMIT 1"
    step = 1
    while step < SEEK_IDS_MAX:
        with contextlib.suppress(sqlite3.Error):
            row = db.execute(sql, (after + step,)).fetchone()
            for run in _run_of(db, row) if row else ():
                if run.id >= after + step and run.n and whole(run):
                    return run.id
        step += 1 if step < LOOKUPS_MAX else step
    return None
