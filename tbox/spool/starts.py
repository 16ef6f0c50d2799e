"""What a spool knows of earlier starts: how each ended, the highest number given out. Changes nothing."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from tbox.durable import OsStorage, Storage
from tbox.spool.flash import FILE_NAME, Connect, StartRow
from tbox.spool.keyring import copied_keys
from tbox.spool.lock import DirectoryLock

EARLIER_STARTS_MAX = 16


class PreviousStart(msgspec.Struct, frozen=True, kw_only=True):
    """How the start before this one ended.

    Every record of it up to last_committed_id was committed or acknowledged; None: it committed none.
    earlier: starts before it whose end may not have been told, because their successor left no record.
    """

    start: int
    last_committed_id: int | None
    clean: bool
    ledger: dict[str, Any] | None = None
    earlier: tuple[PreviousStart, ...] = ()


def previous_start(ended: Sequence[StartRow]) -> PreviousStart | None:
    """Return how the newest of these starts ended, with those before it that may never have been told of."""
    if not ended:
        return None
    told = [_ending(ended[-1])]
    for row, before in zip(reversed(ended), reversed(ended[:-1]), strict=False):
        if row.last_id is not None or row.clean or len(told) > EARLIER_STARTS_MAX:
            break
        told.append(_ending(before))
    return msgspec.structs.replace(told[0], earlier=tuple(told[1:]))


def _ending(row: StartRow) -> PreviousStart:
    ledger = msgspec.json.decode(row.ledger) if row.ledger else None
    return PreviousStart(start=row.start, last_committed_id=row.last_id, clean=bool(row.clean), ledger=ledger)


def needed_starts(previous: PreviousStart | None) -> set[int]:
    """Return the starts whose rows must stay until a later start has told of them."""
    return {one.start for one in (previous, *previous.earlier)} if previous else set()


def highest_start_seen(
    directory: str, connect: Connect = sqlite3.connect, storage: Storage | None = None
) -> int:
    """Return the highest start number that a stopped spool holds, 0 for none: for `next_start(seen=)`.

    Raises SpoolLocked when the spool is in use. A damaged file is looked at as far as it can be read.
    """
    storage = storage or OsStorage()
    path = f"{directory}/{FILE_NAME}"
    if not storage.exists(directory):
        return 0
    lock = DirectoryLock(directory)
    try:
        seen = max((row.start for row in copied_keys(storage, directory)), default=0)
        if not storage.exists(path):
            return seen
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            seen = max(seen, _highest_in_file(path, connect))
        return seen
    finally:
        lock.release()


def _highest_in_file(path: str, connect: Connect) -> int:
    db = connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        highest = 0
        for sql in (
            "SELECT max(start) FROM start",
            "SELECT max(id) >> 32 FROM alarm",
            "SELECT max(id) >> 32 FROM routine",
        ):
            highest = max(highest, db.execute(sql).fetchone()[0] or 0)
        return highest
    finally:
        db.close()
