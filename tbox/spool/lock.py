"""One process a spool: the lock on its directory, and the errors of opening it. Reads no file of it."""

from __future__ import annotations

import fcntl
import os

from tbox.errors import TboxError


class SpoolError(TboxError):
    """The spool cannot be opened; its data is untouched."""


class SpoolLocked(SpoolError):
    """Another process has this spool open."""


class DirectoryLock:
    """Holds a directory for one process; the lock dies with the process."""

    def __init__(self, directory: str) -> None:
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise SpoolLocked(
                "another process has this spool open", where=directory, mend="stop it first, or ask it"
            ) from error

    def release(self) -> None:
        os.close(self._fd)
