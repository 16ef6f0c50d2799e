"""Encryption at rest: AES-256-GCM under a random data key per start, wrapped by a device key. Logs no key.

A record is sealed once: nonce = its id, which is never used twice under one data key; its id, kind and
level are authenticated with it. Rotating the device key rewraps a few data keys and leaves the backlog alone.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import stat
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tbox.durable import Storage
from tbox.errors import TboxError
from tbox.model import Record

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
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


def _nonce(record_id: int) -> bytes:
    return record_id.to_bytes(NONCE_BYTES, "big")


def _aad(record_id: int, kind: str, level: int) -> bytes:
    return _class_of(kind, level) + record_id.to_bytes(8, "big")


@functools.lru_cache(maxsize=64)
def _class_of(kind: str, level: int) -> bytes:
    return f"{kind} {level} ".encode()


class Sealer:
    """The data key of one start at work."""

    def __init__(self, data_key: bytes) -> None:
        self._aead = AESGCM(data_key)

    def seal(self, record: Record) -> bytes:
        aad = _aad(record.id, record.kind, record.level)
        return self._aead.encrypt(_nonce(record.id), record.payload, aad)

    def open(self, record_id: int, kind: str, level: int, sealed: bytes) -> bytes | None:
        """Return the payload, or None when a bit of it, of its id, kind or level is not as it was sealed."""
        try:
            return self._aead.decrypt(_nonce(record_id), sealed, _aad(record_id, kind, level))
        except (InvalidTag, ValueError):
            return None


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
