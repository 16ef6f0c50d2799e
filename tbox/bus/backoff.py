"""When to try a bus again that went away: doubling waits with an upper limit. Never opens anything."""

from __future__ import annotations

from tbox.model import NS_PER_MS

REOPEN_FIRST_MS = 100
REOPEN_LIMIT_MS = 5_000  # an interface that comes back is read again within 5 s


class Backoff:
    """A core: the time comes in as an argument."""

    def __init__(self) -> None:
        self._wait_ms = REOPEN_FIRST_MS
        self.due_ns = 0  # monotonic time of the next attempt

    def failed(self, mono_ns: int) -> None:
        """An attempt failed, or the bus was lost: wait, twice as long each time."""
        self.due_ns = mono_ns + self._wait_ms * NS_PER_MS
        self._wait_ms = min(self._wait_ms * 2, REOPEN_LIMIT_MS)

    def worked(self) -> None:
        self._wait_ms = REOPEN_FIRST_MS
        self.due_ns = 0

    def wait_ns(self, mono_ns: int) -> int:
        return max(0, self.due_ns - mono_ns)
