"""Counts what the spool's thread writes to flash, as the kernel accounts it. Estimates nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

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
    """Flash bytes written since the start and today (UTC; by monotonic time while the clock is unset).

    The kernel keeps an account for each thread: what counts is what the thread that ticks has written since
    it ticked first, or made this. It is asked when somebody wants to know and at midnight, not at every tick.
    """

    def __init__(self, read: Callable[[], int | None] | None = None) -> None:
        self._account = ThreadAccount()
        self._read = read or self._account
        self._thread = threading.get_ident()
        self._seen_bytes = self._read()  # the thread's account when it was last asked for
        self._day: int | None = None
        self.total_bytes: int | None = None if self._seen_bytes is None else 0
        self.today_bytes: int | None = self.total_bytes

    def follow(self, now: Now) -> None:
        """Tell which thread writes from here on, and on which day."""
        if self._thread != threading.get_ident():
            self._thread, self._seen_bytes = threading.get_ident(), self._read()
        day = (now.wall_ns if now.wall_ns is not None else now.mono_ns) // (S_PER_DAY * NS_PER_S)
        if day != self._day:
            if self._day is not None:
                self.count()
                self.today_bytes = None if self.total_bytes is None else 0
            self._day = day

    def count(self) -> None:
        """Bring the sums up to date; called by another thread than that which ticks, leave them."""
        if self._thread != threading.get_ident():
            return
        before, self._seen_bytes = self._seen_bytes, self._read()
        if before is not None and self._seen_bytes is not None:
            self.total_bytes = (self.total_bytes or 0) + self._seen_bytes - before
            self.today_bytes = (self.today_bytes or 0) + self._seen_bytes - before

    def close(self) -> None:
        self._account.close()
