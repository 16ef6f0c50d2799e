"""The keys of a spool: the device key file, the data keys of all starts, their second copy. Writes no record.

Data keys stand wrapped in the database's `start` table and, in case that page is damaged, once more in two
CRC'd copies `keys.0`, `keys.1`. The device key is rotated by putting the new one beside the old as
`<key file>.next`: the next open rewraps the data keys in one transaction and then renames the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from tbox.durable import Storage, TwoCopies
from tbox.model import COUNTER_BITS
from tbox.spool.flash import Flash, Run, StartRow
from tbox.spool.schema import KIND_NAMES
from tbox.spool.seal import (
    KEY_BYTES,
    Random,
    Sealer,
    SpoolKeyError,
    key_id,
    read_key,
    unwrap,
    wrap,
    write_key,
)

KEY_FILE_NAME = "device.key"
NEXT_SUFFIX = ".next"
# The second copy is one small value: room for this many starts, the newest first.
COPIED_STARTS_MAX = 500

_MEND_KEY = "put the device key back that this spool was written with, or move the spool directory aside"


class _CopiedKey(msgspec.Struct, frozen=True, array_like=True):
    start: int
    key_id: bytes
    wrapped: bytes


class Keyring:
    """The device key and every data key it opens."""

    def __init__(self, device_key: bytes, random: Random) -> None:
        self._device_key = device_key
        self._random = random
        self._wrapped: dict[int, list[bytes]] = {}  # the database's, then the second copy's
        self._sealers: dict[int, Sealer | None] = {}
        self.key_id = key_id(device_key)

    def learn(self, rows: Iterable[StartRow]) -> None:
        """Take in wrapped data keys; they are unwrapped when a record of their start is read."""
        for row in rows:
            self._wrapped.setdefault(row.start, []).append(row.wrapped)

    def new_start(self, start: int) -> StartRow:
        """Make the data key of a new start; return the row to be stored."""
        data_key = self._random(KEY_BYTES)
        self._sealers[start] = Sealer(data_key)
        wrapped = wrap(self._device_key, start, data_key, self._random)
        return StartRow(start, self.key_id, wrapped, None, None, None)

    def sealer(self, start: int) -> Sealer | None:
        """Return a start's data key at work, None when it is lost or damaged."""
        if start not in self._sealers:
            keys = (unwrap(self._device_key, start, one) for one in self._wrapped.get(start, ()))
            data_key = next((key for key in keys if key is not None), None)
            self._sealers[start] = Sealer(data_key) if data_key else None
        return self._sealers[start]

    def unseal(self, run: Run) -> list[bytes] | None:
        """Return the payloads of a run; None when it is not what was sealed, or its data key is lost."""
        sealer, kind = self.sealer(run.id >> COUNTER_BITS), KIND_NAMES.get(run.kind)
        if sealer is None or kind is None or run.sealed is None:
            return None
        return sealer.open(run.id, run.n, kind, run.level, run.sealed)

    def rewrap(self, row: StartRow, old_key: bytes, where: str) -> StartRow:
        """Return the row with its data key under this ring's device key. Raises SpoolKeyError."""
        if row.key_id == self.key_id:
            return row
        data_key = unwrap(old_key, row.start, row.wrapped)
        if data_key is None:
            raise SpoolKeyError("neither device key opens this spool", where=where, mend=_MEND_KEY)
        wrapped = wrap(self._device_key, row.start, data_key, self._random)
        return row._replace(key_id=self.key_id, wrapped=wrapped)


def copy_keys(storage: Storage, directory: str, rows: Sequence[StartRow]) -> None:
    """Put the wrapped data keys in their second copy. Raises OSError."""
    copied = [_CopiedKey(row.start, row.key_id, row.wrapped) for row in rows[-COPIED_STARTS_MAX:]]
    payload = msgspec.msgpack.encode(copied)
    copies = TwoCopies(storage, directory, "keys")
    held = copies.read()
    if held is None or held[1] != payload:
        copies.write(payload)


def copied_only(rows: Sequence[StartRow], copied: Sequence[StartRow]) -> list[StartRow]:
    """Return the copied keys of starts that the database has no row of."""
    known = {row.start for row in rows}
    return [row for row in copied if row.start not in known]


def copied_keys(storage: Storage, directory: str) -> list[StartRow]:
    """Return the second copy of the wrapped data keys, oldest start first; empty when there is none."""
    try:
        held = TwoCopies(storage, directory, "keys").read()
        keys = msgspec.msgpack.decode(held[1], type=list[_CopiedKey]) if held else []
    except (OSError, msgspec.DecodeError):
        return []
    return [StartRow(key.start, key.key_id, key.wrapped, None, None, None) for key in keys]


def open_keyring(
    storage: Storage, key_file: str, known: Sequence[StartRow], random: Random, *, has_data: bool
) -> Keyring:
    """Read the device key, or make one for a spool without data; check it against the data it must open.

    known: start rows of the spool, oldest first. Raises SpoolKeyError and leaves everything as it is when
    the key is missing, wrong or open to others; OSError when the medium refuses.
    """
    key = read_key(storage, key_file)
    if key is None:
        if has_data or known:
            raise SpoolKeyError(
                "the device key is missing and the spool holds data", where=key_file, mend=_MEND_KEY
            )
        key = random(KEY_BYTES)
        write_key(storage, key_file, key)
    ring = Keyring(key, random)
    if known and known[-1].key_id != ring.key_id:
        raise SpoolKeyError("the device key is not the one of this spool", where=key_file, mend=_MEND_KEY)
    ring.learn(known)
    return ring


def rotate(storage: Storage, key_file: str, flash: Flash, directory: str, random: Random) -> None:
    """Finish a rotation that somebody has asked for by putting `<key_file>.next` there.

    The data keys are rewrapped in one transaction; only then the new key takes the old one's name. Cut
    anywhere, the next open finds either key able to open every row and comes here again. Raises
    SpoolKeyError, sqlite3.Error, OSError.
    """
    fresh = f"{key_file}{NEXT_SUFFIX}"
    new_key = read_key(storage, fresh)
    if new_key is None:
        return
    old_key = read_key(storage, key_file) or new_key
    ring = Keyring(new_key, random)
    rewrapped = [ring.rewrap(row, old_key, fresh) for row in flash.starts()]
    flash.begin()
    for row in rewrapped:
        flash.put_start(row)
    flash.commit()
    copy_keys(storage, directory, rewrapped)
    storage.rename(fresh, key_file)
    storage.fsync_dir(key_file.rpartition("/")[0])
