"""`tbox spool stat|tail|verify|salvage|export DIR`: looks into a spool. Never deletes a record.

A stopped spool is opened; of a live one, whose directory is locked, the running agent is asked.
"""

from __future__ import annotations

import contextlib
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
from tbox.spool import look
from tbox.spool.flash import FILE_NAME, Flash, Run, is_damage
from tbox.spool.keyring import KEY_FILE_NAME, Keyring, copied_keys, open_keyring
from tbox.spool.lock import DirectoryLock, SpoolError, SpoolLocked
from tbox.spool.recover import DAMAGED_NAME, LOG_SUFFIX, salvage

ANSWER_S = 30.0
TAIL_MAX = 1000
QUOTA_BYTES_MAX = 16 * 1024**3


@click.group()
def spool() -> None:
    """Look into a spool."""


_directory = click.argument("directory", type=click.Path(exists=True, file_okay=False))
_socket = click.option(
    "--socket", "socket_path", default="", help="Control socket of the agent that has it open."
)
_key = click.option("--key-file", default="", help="Device key; default: device.key in the directory.")


@contextlib.contextmanager
def _stopped(directory: str, key_file: str) -> Iterator[tuple[Flash, Keyring]]:
    """Open a spool that no agent has open. Raises SpoolLocked when one has."""
    lock = DirectoryLock(directory)
    try:
        path = f"{directory}/{FILE_NAME}"
        if not Path(path).exists():
            raise _no_spool(directory)
        try:
            with contextlib.closing(Flash(path, sqlite3.connect, QUOTA_BYTES_MAX, migrate=False)) as flash:
                yield flash, _keys(directory, key_file, flash)
        except sqlite3.Error as error:
            raise (Refused if is_damage(error) else SpoolError)(
                f"cannot read the spool: {error}", where=path, mend="try `tbox spool salvage`"
            ) from error
    finally:
        lock.release()


def _no_spool(directory: str) -> SpoolError:
    return SpoolError("there is no spool here", where=directory, mend="name the spool's directory")


def _keys(directory: str, key_file: str, flash: Flash) -> Keyring:
    ring = open_keyring(
        OsStorage(), key_file or f"{directory}/{KEY_FILE_NAME}", flash.starts(), _no_random, has_data=True
    )
    ring.learn(copied_keys(OsStorage(), directory))
    return ring


def _no_random(_size: int) -> bytes:
    raise AssertionError("looking makes no keys")


@spool.command()
@_directory
@_key
@_socket
def stat(directory: str, key_file: str, socket_path: str) -> None:
    """Print what a spool holds as one line of JSON."""
    try:
        with _stopped(directory, key_file) as (flash, _):
            print(json.dumps(look.stat(flash)))
    except SpoolLocked:
        print(json.dumps(_ask(directory, socket_path, "spool-stat")))


def _ask(directory: str, socket_path: str, what: str, **more: Any) -> dict[str, Any]:
    """Ask the agent that has the spool open; its socket stands beside the spool unless it is named."""
    beside = Path(directory).resolve().parent / "control.sock"
    return request(socket_path or str(beside), {"cmd": what, **more}, ANSWER_S)


@spool.command()
@_directory
@_key
@_socket
@click.option("-n", "--lines", default=20, show_default=True, type=click.IntRange(1, TAIL_MAX))
def tail(directory: str, key_file: str, socket_path: str, lines: int) -> None:
    """Print the newest records, one JSON object a line."""
    try:
        with _stopped(directory, key_file) as (flash, keys):
            newest = look.tail(flash, keys, lines)
    except SpoolLocked:
        newest = _ask(directory, socket_path, "spool-tail", lines=lines)["records"]
    for record in newest:
        print(json.dumps(record))


@spool.command()
@_directory
@_key
@click.option("--out", type=click.File("w"), default="-", help="Default: standard output.")
def export(directory: str, key_file: str, out: TextIO) -> None:
    """Write every record of a stopped spool as JSON lines, payload in base64."""
    with _stopped(directory, key_file) as (flash, keys):
        for record in look.records(flash, keys):
            print(json.dumps(record), file=out)


@spool.command()
@_directory
@_key
@_socket
def verify(directory: str, key_file: str, socket_path: str) -> None:
    """Check the file's structure, and that every record unseals (live: the newest). Exit 1 if not."""
    try:
        with _stopped(directory, key_file) as (flash, keys):
            found = look.verify(flash, keys)
    except SpoolLocked:
        found = _ask(directory, socket_path, "spool-verify")
    print(json.dumps(found))
    if found["faults"] or found["unreadable"]:
        raise Refused(
            f"{len(found['faults'])} faults in the file, {found['unreadable']} records do not unseal",
            where=directory, mend="the next start salvages what can be read; or run `tbox spool salvage`",
        )  # fmt: skip


@spool.command(name="salvage")
@_directory
@_key
@click.option("--out", type=click.File("w"), default="-", help="Default: standard output.")
def salvage_command(directory: str, key_file: str, out: TextIO) -> None:
    """Read what can be read of a damaged spool, run by run, as JSON lines; the spool stays as it is."""
    lock = DirectoryLock(directory)
    try:
        names = [path.name for path in sorted(Path(directory).glob(f"{FILE_NAME}*"))]
        files = [name for name in names if name == FILE_NAME or name.startswith(DAMAGED_NAME)]
        files = [name for name in files if not name.endswith(LOG_SUFFIX)]
        if not files:
            raise _no_spool(directory)
        key = key_file or f"{directory}/{KEY_FILE_NAME}"
        copied = copied_keys(OsStorage(), directory)
        keys = open_keyring(OsStorage(), key, copied, _no_random, has_data=True)
        counts = {"records": 0, "spoiled": 0, "gaps": 0}
        for name in files:
            _salvage_file(f"{directory}/{name}", keys, out, counts)
    finally:
        lock.release()
    print(json.dumps(counts), file=sys.stderr)
    if not counts["records"]:
        raise TboxError(
            "nothing could be read",
            where=directory,
            mend="check the key; the next start of the agent may read more",
        )


def _salvage_file(path: str, keys: Keyring, out: TextIO, counts: dict[str, int]) -> None:
    def whole(run: Run) -> bool:
        return all(record["payload"] is not None for record in look.described(run, keys))

    for found in salvage(path, sqlite3.connect, lambda _lane: 0, whole):
        for record in look.described(found.run, keys) if found.run else ():
            counts["records" if found.whole else "spoiled"] += 1
            if found.whole:
                print(json.dumps(record), file=out)
        counts["gaps"] += found.run is None
