"""Counts what the spool's thread writes to flash, as the kernel accounts it. Estimates nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tbox.model import NS_PER_S, Now

_ACCOUNT = Path("/proc/thread-self/io")  # CONFIG_TASK_IO_ACCOUNTING; memory disks count as nothing
S_PER_DAY = 86_400


def thread_written_bytes() -> int | None:
    """Return the bytes this thread has caused to be written, None where the kernel does not count them."""
    try:
        for line in _ACCOUNT.read_text().splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split(":")[1])
    except (OSError, ValueError):
        pass
    return None


class WriteMeter:
    """Flash bytes written since the start and today (UTC; by monotonic time while the clock is unset)."""

    def __init__(self, read: Callable[[], int | None] = thread_written_bytes) -> None:
        self._read = read
        self._day: int | None = None
        self.total_bytes: int | None = 0 if read() is not None else None
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

    def _add(self, written: int, now: Now) -> None:
        day = (now.wall_ns if now.wall_ns is not None else now.mono_ns) // (S_PER_DAY * NS_PER_S)
        if day != self._day:
            self._day, self.today_bytes = day, 0
        self.total_bytes = (self.total_bytes or 0) + written
        self.today_bytes = (self.today_bytes or 0) + written
