"""Encryption at rest: AES-256-GCM under a random data key per start, wrapped by a device key. Logs no key.

A run of records is sealed once. Nonce: its first id and its length, which under one data key always name
the same records, so no nonce ever seals two texts. First id, length, kind and level are authenticated with
it. Rotating the device key rewraps a few data keys and leaves the backlog alone.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tbox.durable import Storage
from tbox.errors import TboxError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
LENGTH_BYTES = 4  # of each payload, in front of a run of several
KEY_ID_BYTES = 8

Random = Callable[[int], bytes]


class SpoolKeyError(TboxError):
    """The device key is missing, wrong or open to others. The spool keeps its data and refuses to start."""


def key_id(device_key: bytes) -> bytes:
    """Return a public name of a device key that tells nothing about it."""
    return hmac.digest(device_key, b"tbox device key id", hashlib.sha256)[:KEY_ID_BYTES]


def _start_aad(start: int) -> bytes:
    return b"tbox data key %d" % start


def wrap(device_key: bytes, start: int, data_key: bytes, random: Random) -> bytes:
    """Return a start's data key as it is stored: nonce, then the sealed key."""
    nonce = random(NONCE_BYTES)
    return nonce + AESGCM(device_key).encrypt(nonce, data_key, _start_aad(start))


def unwrap(device_key: bytes, start: int, wrapped: bytes) -> bytes | None:
    """Return a start's data key, or None when this is not its device key or the bytes are damaged."""
    try:
        return AESGCM(device_key).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], _start_aad(start))
    except (InvalidTag, ValueError):
        return None


def _nonce(first_id: int, n: int) -> bytes:
    return struct.pack(">QI", first_id, n)


def _aad(first_id: int, n: int, kind: str, level: int) -> bytes:
    return b"%s %d %d %d" % (kind.encode(), level, n, first_id)


def sealed_overhead_bytes(n: int) -> int:
    """Return what sealing adds to the payloads of a run of n records."""
    return TAG_BYTES + (LENGTH_BYTES * n if n > 1 else 0)


def _joined(payloads: Sequence[bytes]) -> bytes:
    if len(payloads) == 1:
        return payloads[0]
    return b"".join((struct.pack(f"<{len(payloads)}I", *map(len, payloads)), *payloads))


def _parted(n: int, body: bytes) -> list[bytes]:
    if n == 1:
        return [body]
    payloads, at = [], LENGTH_BYTES * n
    for size in struct.unpack_from(f"<{n}I", body):
        payloads.append(body[at : at + size])
        at += size
    return payloads


class Sealer:
    """The data key of one start at work."""

    def __init__(self, data_key: bytes) -> None:
        self._aead = AESGCM(data_key)

    def seal(self, first_id: int, kind: str, level: int, payloads: Sequence[bytes]) -> bytes:
        """Return the payloads of consecutive records as one sealed body."""
        n = len(payloads)
        return self._aead.encrypt(_nonce(first_id, n), _joined(payloads), _aad(first_id, n, kind, level))

    def open(self, first_id: int, n: int, kind: str, level: int, sealed: bytes) -> list[bytes] | None:
        """Return the payloads, or None when a bit of the body or of what it is bound to has changed."""
        try:
            body = self._aead.decrypt(_nonce(first_id, n), sealed, _aad(first_id, n, kind, level))
        except (InvalidTag, ValueError):
            return None
        return _parted(n, body)


def read_key(storage: Storage, path: str) -> bytes | None:
    """Return the device key in a file, None when there is no file.

    Raises SpoolKeyError when others may read it or it is not a key.
    """
    if not storage.exists(path):
        return None
    if Path(path).is_file() and Path(path).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SpoolKeyError("the device key is open to others", where=path, mend=f"chmod 600 {path}")
    key = storage.read(path)
    if len(key) != KEY_BYTES:
        raise SpoolKeyError(
            f"a device key has {KEY_BYTES} bytes, this file has {len(key)}",
            where=path,
            mend="put the right key file back; the spool's data is untouched",
        )
    return key


def write_key(storage: Storage, path: str, key: bytes) -> None:
    """Put a new device key in a file with mode 0600, durable and whole before its name exists."""
    fresh = f"{path}.tmp"
    if storage.exists(fresh):
        storage.unlink(fresh)  # left by a cut; it may be of any length
    storage.write(fresh, key)
    storage.fsync(fresh)
    storage.rename(fresh, path)
    storage.fsync_dir(str(Path(path).parent))
