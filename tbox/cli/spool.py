"""`tbox spool stat|tail|verify|salvage|export DIR`: looks into a spool. Never deletes a record.

A stopped spool is opened; of a live one, whose directory is locked, the running agent is asked for `stat`.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import heapq
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from tbox.control import request
from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.model import COUNTER_MAX
from tbox.spool.flash import FILE_NAME, Flash, Row
from tbox.spool.keyring import KEY_FILE_NAME, Keyring, copied_keys, open_keyring
from tbox.spool.policy import LANES, Lane
from tbox.spool.recover import DAMAGED_NAME, salvage
from tbox.spool.schema import KIND_NAMES
from tbox.spool.store import DirectoryLock, SpoolError, SpoolLocked

READ_ROWS = 256
READ_BYTES = 1 << 20
QUOTA_BYTES_MAX = 16 * 1024**3


@click.group()
def spool() -> None:
    """Look into a spool."""


_directory = click.argument("directory", type=click.Path(exists=True, file_okay=False))
_key = click.option("--key-file", default="", help="Device key; default: device.key in the directory.")


@contextlib.contextmanager
def _stopped(directory: str, key_file: str) -> Iterator[tuple[Flash, Keyring]]:
    """Open a spool that no agent has open. Raises SpoolLocked when one has."""
    lock = DirectoryLock(directory)
    try:
        path = f"{directory}/{FILE_NAME}"
        if not Path(path).exists():
            raise SpoolError("there is no spool here", where=directory, mend="name the spool's directory")
        try:
            with contextlib.closing(Flash(path, sqlite3.connect, QUOTA_BYTES_MAX)) as flash:
                yield flash, _keys(directory, key_file, flash)
        except sqlite3.Error as error:
            raise SpoolError(
                f"cannot read the spool: {error}", where=path, mend="try `tbox spool salvage`"
            ) from error
    finally:
        lock.release()


def _keys(directory: str, key_file: str, flash: Flash) -> Keyring:
    ring = open_keyring(
        OsStorage(), key_file or f"{directory}/{KEY_FILE_NAME}", flash.starts(), _no_random, has_data=True
    )
    ring.learn(copied_keys(OsStorage(), directory))
    return ring


def _no_random(_size: int) -> bytes:
    raise AssertionError("looking makes no keys")


def _rows(flash: Flash, lane: Lane) -> Iterator[Row]:
    after = 0
    while rows := flash.read(lane, after, READ_ROWS, READ_BYTES):
        after = rows[-1].id
        yield from (row for row in rows if row.sealed is not None)


def _all_rows(flash: Flash) -> Iterator[Row]:
    return heapq.merge(*(_rows(flash, lane) for lane in LANES))


def _described(row: Row, keys: Keyring | None) -> dict[str, Any]:
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


@spool.command()
@_directory
@_key
@click.option("--socket", "socket_path", default="", help="Control socket of the agent that has it open.")
def stat(directory: str, key_file: str, socket_path: str) -> None:
    """Print what a spool holds as one line of JSON."""
    try:
        with _stopped(directory, key_file) as (flash, _):
            print(json.dumps(_stat_stopped(flash)))
    except SpoolLocked:
        print(json.dumps(request(socket_path or f"{directory}/control.sock", {"cmd": "spool-stat"})))


def _stat_stopped(flash: Flash) -> dict[str, Any]:
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


@spool.command()
@_directory
@_key
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(1, 100_000))
def tail(directory: str, key_file: str, lines: int) -> None:
    """Print the newest records of a stopped spool, one JSON object a line."""
    with _stopped(directory, key_file) as (flash, keys):
        for row in collections.deque(_all_rows(flash), maxlen=lines):
            print(json.dumps(_described(row, keys)))


@spool.command()
@_directory
@_key
@click.option("--out", type=click.File("w"), default="-", help="Default: standard output.")
def export(directory: str, key_file: str, out: TextIO) -> None:
    """Write every record of a stopped spool as JSON lines, payload in base64."""
    with _stopped(directory, key_file) as (flash, keys):
        for row in _all_rows(flash):
            print(json.dumps(_described(row, keys)), file=out)


@spool.command()
@_directory
@_key
def verify(directory: str, key_file: str) -> None:
    """Check a stopped spool: the file's structure, and that every record unseals. Exit 1 if not."""
    with _stopped(directory, key_file) as (flash, keys):
        faults = [row[0] for row in flash.execute("PRAGMA integrity_check(20)") if row[0] != "ok"]
        unsealed = [_described(row, keys)["payload"] is not None for row in _all_rows(flash)]
        unreadable = unsealed.count(False)
        print(json.dumps({"records": len(unsealed), "unreadable": unreadable, "faults": faults}))
    if faults or unreadable:
        raise Refused(
            f"{len(faults)} faults in the file, {unreadable} records do not unseal",
            where=directory, mend="the next start salvages what can be read; or run `tbox spool salvage`",
        )  # fmt: skip


@spool.command(name="salvage")
@_directory
@_key
@click.option("--out", type=click.File("w"), default="-", help="Default: standard output.")
def salvage_command(directory: str, key_file: str, out: TextIO) -> None:
    """Read what can be read of a damaged spool, row by row, as JSON lines; the spool stays as it is."""
    lock = DirectoryLock(directory)
    try:
        keys = open_keyring(
            OsStorage(), key_file or f"{directory}/{KEY_FILE_NAME}", [], _no_random, has_data=True
        )
        keys.learn(copied_keys(OsStorage(), directory))
        counts = {"records": 0, "unreadable": 0}
        names = [path.name for path in sorted(Path(directory).glob(f"{FILE_NAME}*"))]
        for name in names:
            if name == FILE_NAME or (name.startswith(DAMAGED_NAME) and not name.endswith("-wal")):
                _salvage_file(f"{directory}/{name}", keys, out, counts)
    finally:
        lock.release()
    print(json.dumps(counts), file=sys.stderr)
    if not counts["records"]:
        raise TboxError("nothing could be read", where=directory, mend="is this a spool and its key?")


def _salvage_file(path: str, keys: Keyring, out: TextIO, counts: dict[str, int]) -> None:
    for found in salvage(path, sqlite3.connect, lambda _lane: 0):
        for row in found.rows:
            print(json.dumps(_described(row, keys)), file=out)
        counts["records"] += len(found.rows)
        counts["unreadable"] += sum(lost.records for lost in found.lost)
