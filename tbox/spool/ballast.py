"""A file that holds the room between the spool's present size and its cap, so that others cannot fill it.

It shrinks as the database grows. It is allocated without being written, and only where the file system can
do that; it is never read.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

FILE_NAME = "ballast"
# The database grows in steps of this size, and so does the room that is let go.
STEP_BYTES = 1024 * 1024
# The log, its checkpoint and one transaction live here besides the database.
LOG_ROOM_BYTES = 12 * 1024 * 1024
# What the ballast never takes from the rest of the system.
FREE_BYTES_MIN = 64 * 1024 * 1024

Allocate = Callable[[str, int], None]


def allocate(path: str, size_bytes: int) -> None:
    """Make a file of this size whose blocks are reserved but not written. Raises OSError.

    posix_fallocate would write every block where the file system cannot reserve; Linux's own call refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        held = os.fstat(fd).st_size
        if held < size_bytes:
            done = libc.fallocate(fd, 0, ctypes.c_longlong(held), ctypes.c_longlong(size_bytes - held))
            if done != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(fd)


def size_for(cap_bytes: int, database_bytes: int) -> int:
    """Return how large the ballast is beside a database of this size: whole steps, 0 at the cap."""
    grown = -(-database_bytes // STEP_BYTES) * STEP_BYTES + STEP_BYTES
    return max(0, cap_bytes - grown)


class Ballast:
    """Keeps the ballast file at the size that the database leaves of the cap."""

    def __init__(self, directory: str, cap_bytes: int, allocate: Allocate = allocate) -> None:
        self._path = f"{directory}/{FILE_NAME}"
        self._cap_bytes = cap_bytes
        self._allocate = allocate
        self.size_bytes = Path(self._path).stat().st_size if Path(self._path).exists() else 0
        self.shortfall = ""  # why the room could not be held

    def fit(self, database_bytes: int, *, grow: bool) -> None:
        """Shrink, or at open grow, to what the database leaves. `shortfall` says why it could not."""
        wanted = size_for(self._cap_bytes, database_bytes)
        try:
            if wanted < self.size_bytes:
                self._shrink(wanted)
            elif grow and wanted > self.size_bytes:
                self._grow(wanted)
        except OSError as error:
            self.shortfall = error.strerror or str(error)

    def give_way(self) -> bool:
        """The disk is full: let a step go. Return whether there was one."""
        if not self.size_bytes:
            return False
        try:
            self._shrink(max(0, self.size_bytes - STEP_BYTES - LOG_ROOM_BYTES))
        except OSError as error:
            self.shortfall = error.strerror or str(error)
            return False
        self.shortfall = "given to a full disk"
        return True

    def _grow(self, wanted: int) -> None:
        disk = os.statvfs(Path(self._path).parent)
        spare = disk.f_bavail * disk.f_frsize - FREE_BYTES_MIN + self.size_bytes
        if spare < wanted:
            self.shortfall = f"{max(0, spare)} bytes free for {wanted}"
            wanted = spare
        if wanted > self.size_bytes:
            self._allocate(self._path, wanted)
            self.size_bytes = wanted

    def _shrink(self, size_bytes: int) -> None:
        if size_bytes:
            os.truncate(self._path, size_bytes)
        else:
            Path(self._path).unlink(missing_ok=True)
        self.size_bytes = size_bytes


def remove(directory: str) -> None:
    """Let all of the room go: a setting turned the ballast off."""
    Path(f"{directory}/{FILE_NAME}").unlink(missing_ok=True)
