"""Small facts that must survive a power cut: two alternating, CRC'd copies of a value. Nothing big.

`Storage` is the only door to the disk used here, so that tests can log every operation, cut the power
between any two and tear the last. Boot control and the start number rest on `TwoCopies`.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Protocol

from tbox.errors import TboxError

# magic, format, sequence number, payload length; then the payload; then CRC-32 over everything before it.
_HEADER = struct.Struct("<4sIQI")
_CRC = struct.Struct("<I")
_MAGIC = b"TB2C"
_FORMAT = 1
TWO_COPIES_PAYLOAD_BYTES_MAX = 64 * 1024


class DurableError(TboxError):
    """A durable value could not be read or written."""


class Storage(Protocol):
    """What durable code may ask of a file system. Paths are str. Every method raises OSError as os does."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        """Write at an offset without truncating; not durable before `fsync(path)`."""
        ...

    def truncate(self, path: str, size: int) -> None: ...
    def fsync(self, path: str) -> None: ...
    def fsync_dir(self, path: str) -> None:
        """Make the names in directory `path` durable (creations, renames, unlinks)."""
        ...

    def rename(self, src: str, dst: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def mkdir(self, path: str) -> None:
        """Create a directory; no error when it stands already."""
        ...

    def exists(self, path: str) -> bool: ...
    def listdir(self, path: str) -> list[str]: ...


class RangedStorage(Storage, Protocol):
    """A storage for what is too big to be read whole: images, patches, block devices."""

    def size(self, path: str) -> int:
        """Bytes of a file, or the capacity of a block device."""
        ...

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        """Read up to `length` bytes at an offset; fewer only at the end."""
        ...

    def read_medium(self, path: str, offset: int, length: int) -> bytes:
        """As `read_at`, but from the medium itself and not from the page cache, where the system can."""
        ...


class OsStorage:
    """The real file system."""

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        fd = os.open(path, flags, 0o600)
        try:
            view = memoryview(data)
            while view:
                n = os.pwrite(fd, view, offset)
                view, offset = view[n:], offset + n
        finally:
            os.close(fd)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def fsync(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def fsync_dir(self, path: str) -> None:
        self.fsync(path)

    def rename(self, src: str, dst: str) -> None:
        Path(src).rename(dst)

    def unlink(self, path: str) -> None:
        Path(path).unlink()

    def mkdir(self, path: str) -> None:
        Path(path).mkdir(exist_ok=True)

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def listdir(self, path: str) -> list[str]:
        return sorted(entry.name for entry in Path(path).iterdir())

    def size(self, path: str) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(fd, 0, os.SEEK_END)  # st_size is 0 for a block device
        finally:
            os.close(fd)

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _pread_full(fd, offset, length)
        finally:
            os.close(fd)

    def read_medium(self, path: str, offset: int, length: int) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Synced pages are dropped, so the read goes to the medium. O_DIRECT would say the same with
            # alignment rules of its own, and memory file systems refuse it.
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            return _pread_full(fd, offset, length)
        finally:
            os.close(fd)


def _pread_full(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length > 0 and (part := os.pread(fd, length, offset)):
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)


def frame(sequence: int, payload: bytes) -> bytes:
    """Return one copy as it stands on the medium."""
    assert len(payload) <= TWO_COPIES_PAYLOAD_BYTES_MAX
    head = _HEADER.pack(_MAGIC, _FORMAT, sequence, len(payload)) + payload
    return head + _CRC.pack(zlib.crc32(head))


def unframe(raw: bytes) -> tuple[int, bytes] | None:
    """Return (sequence, payload) of a copy, or None when it is torn, damaged or of another format."""
    if len(raw) < _HEADER.size + _CRC.size:
        return None
    magic, fmt, sequence, length = _HEADER.unpack_from(raw)
    end = _HEADER.size + length
    if (
        magic != _MAGIC
        or fmt != _FORMAT
        or length > TWO_COPIES_PAYLOAD_BYTES_MAX
        or len(raw) < end + _CRC.size
    ):
        return None
    if _CRC.unpack_from(raw, end)[0] != zlib.crc32(raw[:end]):
        return None
    return sequence, raw[_HEADER.size : end]


class TwoCopies:
    """One small value in two files `<stem>.0` and `<stem>.1`, written in turn.

    A write goes to the copy that does not hold the newest value and is synced before it returns, so a cut
    at any point leaves the old value or the new one.
    """

    def __init__(self, storage: Storage, directory: str, stem: str) -> None:
        self._storage = storage
        self._dir = directory
        self._paths = (f"{directory}/{stem}.0", f"{directory}/{stem}.1")

    def read(self) -> tuple[int, bytes] | None:
        """Return (sequence, payload) of the newest whole copy; None when neither copy is whole.

        Raises OSError when the medium refuses; a missing file is not an error.
        """
        whole = [copy for path in self._paths if (copy := self._read_one(path)) is not None]
        return max(whole, default=None)

    def damaged(self) -> bool:
        """Whether a copy exists that cannot be read back: something has written here before."""
        return any(self._storage.exists(path) and self._read_one(path) is None for path in self._paths)

    def write(self, payload: bytes) -> int:
        """Make `payload` the value; return its sequence number. Durable when this returns. Raises OSError."""
        newest = self.read()
        sequence = newest[0] + 1 if newest else 1
        path = self._paths[sequence % 2]
        if newest is not None and self._read_one(path) == newest:
            path = self._paths[(sequence + 1) % 2]
        existed = self._storage.exists(path)
        if existed and self._read_one(path) is None:
            # What is left of a torn copy may bear this very sequence number: a tear of the new copy at
            # the same place could complete it, and a value that never counted would come to life.
            self._storage.truncate(path, 0)
            self._storage.fsync(path)
        raw = frame(sequence, payload)
        self._storage.write(path, raw)
        self._storage.fsync(path)
        if not existed:
            self._storage.fsync_dir(self._dir)
        if self._read_one(path) != (sequence, payload):
            raise DurableError(
                "read back other bytes than were written", where=path, mend="replace the medium"
            )
        return sequence

    def write_both(self, payload: bytes) -> None:
        """Make `payload` the value in both copies, so that one which rots later takes nothing back.

        Writes nothing where both hold it. Durable when this returns. Raises OSError.
        """
        for _ in self._paths:
            copies = [self._read_one(path) for path in self._paths]
            if any(copy is None or copy[1] != payload for copy in copies):
                self.write(payload)

    def _read_one(self, path: str) -> tuple[int, bytes] | None:
        try:
            return unframe(self._storage.read(path))
        except FileNotFoundError:
            return None
