"""Reads a spool for people: what it holds, its newest records, whether all of it is whole. Changes nothing.

The commands use it on a stopped spool, the spool's thread on a live one.
"""

from __future__ import annotations

import base64
import heapq
from collections.abc import Iterable, Iterator
from typing import Any

from tbox.model import COUNTER_MAX
from tbox.spool.flash import Flash, Row
from tbox.spool.keyring import Keyring
from tbox.spool.policy import LANES, Lane
from tbox.spool.schema import KIND_NAMES

READ_ROWS = 256
READ_BYTES = 1 << 20
FAULTS_MAX = 20
GLANCE_RECORDS = 1000  # newest records unsealed of a live spool, whose thread has other work


def stat(flash: Flash) -> dict[str, Any]:
    """Return what a stopped spool holds, by lane and by start."""
    lanes: dict[str, Any] = {}
    for lane in LANES:
        sql = (
            f"SELECT count(*), min(id), max(id), sum(length(sealed) - 16) FROM {lane.name} "
            "WHERE sealed IS NOT NULL"
        )
        count, oldest, newest, size = flash.execute(sql)[0]
        lanes[lane.name] = {"records": count, "oldest_id": oldest, "newest_id": newest, "bytes": size or 0}
    starts = [
        {"start": row.start, "clean": bool(row.clean), "last_id": row.last_id} for row in flash.starts()
    ]
    return {
        "state": "stopped", "records": sum(lane["records"] for lane in lanes.values()), **lanes,
        "used_bytes": flash.used_bytes(), "file_bytes": flash.file_bytes(), "starts": starts,
    }  # fmt: skip


def records(flash: Flash, keys: Keyring | None) -> Iterator[dict[str, Any]]:
    """Yield every record in order of its id."""
    return (described(row, keys) for row in heapq.merge(*(_rows(flash, lane) for lane in LANES)))


def tail(flash: Flash, keys: Keyring | None, lines: int) -> list[dict[str, Any]]:
    """Return the newest records in order of their ids, without reading the others."""
    newest = []
    for lane in LANES:
        sql = f"SELECT id FROM {lane.name} WHERE sealed IS NOT NULL ORDER BY id DESC LIMIT {int(lines)}"
        ids = [row[0] for row in flash.execute(sql)]
        newest.append(_rows(flash, lane, after=ids[-1] - 1) if ids else iter(()))
    return [described(row, keys) for row in list(heapq.merge(*newest))[-lines:]]


def verify(flash: Flash, keys: Keyring | None) -> dict[str, Any]:
    """Check the file's structure and unseal every record."""
    return _verdict(flash, "integrity_check", records(flash, keys), whole=True)


def glance(flash: Flash, keys: Keyring | None) -> dict[str, Any]:
    """Check a live spool quickly: the pages but not the order of their rows, and the newest records."""
    return _verdict(flash, "quick_check", tail(flash, keys, GLANCE_RECORDS), whole=False)


def _verdict(flash: Flash, check: str, found: Iterable[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
    faults = [row[0] for row in flash.execute(f"PRAGMA {check}({FAULTS_MAX})") if row[0] != "ok"]
    count = unreadable = 0
    for record in found:
        count += 1
        unreadable += record["payload"] is None
    return {"records": count, "unreadable": unreadable, "faults": faults, "whole": whole}


def _rows(flash: Flash, lane: Lane, after: int = 0) -> Iterator[Row]:
    while rows := flash.read(lane, after, READ_ROWS, READ_BYTES):
        after = rows[-1].id
        yield from (row for row in rows if row.sealed is not None)


def described(row: Row, keys: Keyring | None) -> dict[str, Any]:
    """Return a record for people; payload None when it cannot be unsealed."""
    kind = KIND_NAMES.get(row.kind, str(row.kind))
    payload = _payload(row, kind, keys)
    return {
        "id": row.id, "start": row.id >> 32, "counter": row.id & COUNTER_MAX, "kind": kind,
        "level": row.level, "stored_at": row.at_s, "bytes": None if payload is None else len(payload),
        "payload": None if payload is None else base64.b64encode(payload).decode(),
    }  # fmt: skip


def _payload(row: Row, kind: str, keys: Keyring | None) -> bytes | None:
    sealer = keys.sealer(row.id >> 32) if keys is not None else None
    return sealer.open(row.id, kind, row.level, row.sealed) if sealer and row.sealed is not None else None
