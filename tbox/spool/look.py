"""Reads a spool for people: what it holds, its newest records, whether all of it is whole. Changes nothing.

The commands use it on a stopped spool, the spool's thread on a live one.
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from tbox.model import COUNTER_MAX
from tbox.spool.flash import Flash, Run, is_damage, is_sound
from tbox.spool.keyring import Keyring
from tbox.spool.policy import LANES, Lane, unpacked
from tbox.spool.schema import KIND_NAMES
from tbox.spool.seal import sealed_overhead_bytes

READ_ROWS = 64
FAULTS_MAX = 20
GLANCE_RECORDS = 1000  # newest records unsealed of a live spool, whose thread has other work


def stat(flash: Flash) -> dict[str, Any]:
    """Return what a stopped spool holds, by lane and by start."""
    lanes: dict[str, Any] = {}
    for lane in LANES:
        count = size = spoiled = 0
        oldest = newest = None
        after = 0
        while runs := flash.sizes(lane, after, READ_ROWS):
            oldest, newest, after = oldest or runs[0].id, runs[-1].last_id, runs[-1].last_id
            held = [run.n - len(unpacked(run.gone, run.id)) for run in runs]
            count += sum(held)
            spoiled += held.count(0)  # given up, and kept for a person
            size += sum(run.sealed_bytes - sealed_overhead_bytes(run.n) for run in runs)
        lanes[lane.name] = {
            "records": count, "oldest_id": oldest, "newest_id": newest, "bytes": size,
            "spoiled_runs": spoiled,
        }  # fmt: skip
    starts = [
        {"start": row.start, "clean": bool(row.clean), "last_id": row.last_id} for row in flash.starts()
    ]
    return {
        "state": "stopped", "records": sum(lane["records"] for lane in lanes.values()), **lanes,
        "used_bytes": flash.used_bytes(), "file_bytes": flash.file_bytes(), "starts": starts,
    }  # fmt: skip


def records(flash: Flash, keys: Keyring | None) -> Iterator[dict[str, Any]]:
    """Yield every record in order of its id."""
    runs = heapq.merge(*(_runs(flash, lane, 0) for lane in LANES))
    return (record for run in runs for record in described(run, keys))


def tail(flash: Flash, keys: Keyring | None, lines: int) -> list[dict[str, Any]]:
    """Return the newest records in order of their ids, without reading the others."""
    newest = []
    for lane in LANES:
        sql = f"SELECT id FROM {lane.name} WHERE sealed IS NOT NULL ORDER BY id DESC LIMIT {int(lines)}"
        ids = [row[0] for row in flash.execute(sql)]
        newest.append(_runs(flash, lane, after=ids[-1] - 1) if ids else iter(()))
    return [record for run in heapq.merge(*newest) for record in described(run, keys)][-lines:]


def verify(flash: Flash, keys: Keyring | None) -> dict[str, Any]:
    """Check the file's structure and unseal every record."""
    return _verdict(flash, "integrity_check", records(flash, keys), whole=True)


def glance(flash: Flash, keys: Keyring | None) -> dict[str, Any]:
    """Check a live spool quickly: the pages but not the order of their rows, and the newest records."""
    return _verdict(flash, "quick_check", tail(flash, keys, GLANCE_RECORDS), whole=False)


def _verdict(flash: Flash, check: str, found: Iterable[dict[str, Any]], *, whole: bool) -> dict[str, Any]:
    faults: list[str] = []
    count = unreadable = 0
    with _noting(faults, check):
        faults += [row[0] for row in flash.execute(f"PRAGMA {check}({FAULTS_MAX})") if row[0] != "ok"]
    with _noting(faults, "reading the records"):
        for record in found:
            count += 1
            unreadable += record["payload"] is None
    return {"records": count, "unreadable": unreadable, "faults": faults, "whole": whole}


@contextlib.contextmanager
def _noting(faults: list[str], what: str) -> Iterator[None]:
    """Damage that ends what is done within is a fault like those that do not."""
    try:
        yield
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        faults.append(f"{what}: {error}")


def _runs(flash: Flash, lane: Lane, after: int) -> Iterator[Run]:
    return (run for run in flash.rows(lane, after) if run.sealed is not None and run.id > after)


def described(run: Run, keys: Keyring | None) -> Iterator[dict[str, Any]]:
    """Yield the records of a run for people; payload None when it cannot be unsealed."""
    if not is_sound(run):
        run, keys = Run(run.id, 1, 0, 0, None, b""), None  # nobody can say how many there were
    kind = KIND_NAMES.get(run.kind, str(run.kind))
    payloads = keys.unseal(run) if keys is not None else None
    gone = unpacked(run.gone, run.id)
    for at in range(run.n):
        one = run.id + at
        if one in gone:
            continue
        payload = payloads[at] if payloads else None
        yield {
            "id": one, "start": one >> 32, "counter": one & COUNTER_MAX, "kind": kind, "level": run.level,
            "stored_at": run.at_s, "bytes": None if payload is None else len(payload),
            "payload": None if payload is None else base64.b64encode(payload).decode(),
        }  # fmt: skip
