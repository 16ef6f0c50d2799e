"""Counts what the spool's thread writes to flash, as the kernel accounts it. Estimates nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tbox.model import NS_PER_S, Now

_ACCOUNT = "/proc/thread-self/io"  # CONFIG_TASK_IO_ACCOUNTING; memory disks count as nothing
_ACCOUNT_BYTES_MAX = 1024
_LABEL = b"\nwrite_bytes: "
S_PER_DAY = 86_400


class ThreadAccount:
    """The bytes that the calling thread has caused to be written. Open once a thread: opening costs most."""

    def __init__(self) -> None:
        self._thread = 0
        self._fd = -1

    def __call__(self) -> int | None:
        """Return the count so far, None where the kernel keeps none."""
        try:
            if self._thread != threading.get_ident():
                self.close()
                self._fd, self._thread = os.open(_ACCOUNT, os.O_RDONLY | os.O_CLOEXEC), threading.get_ident()
            account = os.pread(self._fd, _ACCOUNT_BYTES_MAX, 0)
            return int(account.partition(_LABEL)[2].partition(b"\n")[0])
        except (OSError, ValueError):
            self.close()
            return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._thread = -1, 0


class WriteMeter:
    """Flash bytes written since the start and today (UTC; by monotonic time while the clock is unset)."""

    def __init__(self, read: Callable[[], int | None] | None = None) -> None:
        self._account = ThreadAccount()
        self._read = read or self._account
        self._day: int | None = None
        self.total_bytes: int | None = 0 if self._read() is not None else None
        self.today_bytes: int | None = self.total_bytes

    @contextmanager
    def measure(self, now: Now) -> Iterator[None]:
        """Count what is written within."""
        before = self._read()
        try:
            yield
        finally:
            after = self._read()
            if before is not None and after is not None:
                self._add(after - before, now)

    def close(self) -> None:
        self._account.close()

    def _add(self, written: int, now: Now) -> None:
        day = (now.wall_ns if now.wall_ns is not None else now.mono_ns) // (S_PER_DAY * NS_PER_S)
        if day != self._day:
            self._day, self.today_bytes = day, 0
        self.total_bytes = (self.total_bytes or 0) + written
        self.today_bytes = (self.today_bytes or 0) + written
