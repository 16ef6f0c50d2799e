"""A time without flash: why, when it is tried again, what the RAM ring had to drop. A core, no IO."""

from __future__ import annotations

from typing import Any

from tbox.model import NS_PER_S, Draft, Level, Now
from tbox.spool.policy import Dropped

RETRY_S_FIRST = 1.0
RETRY_S_MAX = 30.0
REPORT_S = 60.0  # how often a full RAM ring says what it dropped


class Outage:
    """Over as long as `reason` is empty. Its alarm is raised once and cleared when the flash is back."""

    def __init__(self) -> None:
        self.reason = ""
        self.dropped = Dropped("ram")  # and not told yet
        self._since_ns = 0
        self._retry_ns = 0
        self._retry_s = RETRY_S_FIRST
        self._reported_ns = 0

    def fail(self, now: Now, error: Exception) -> Draft | None:
        """A try has failed; return the alarm to raise, None when it stands already."""
        self._retry_ns = now.mono_ns + int(self._retry_s * NS_PER_S)
        self._retry_s = min(self._retry_s * 2, RETRY_S_MAX)
        if self.reason:
            return None
        self.reason = " ".join(str(error).split())
        self._since_ns = now.mono_ns
        return self._alarm(now, "raise", f"spool: flash failed ({self.reason}); records are kept in RAM")

    def end(self, now: Now) -> Draft:
        """The flash is back; return the alarm's clearing."""
        self.reason = ""
        self._retry_s = RETRY_S_FIRST
        return self._alarm(now, "clear", "spool: flash is back; records are safe again")

    def waits(self, now: Now) -> bool:
        """Whether the next try is still to come."""
        return bool(self.reason) and now.mono_ns < self._retry_ns

    def hurry(self) -> None:
        """Let the next try be now."""
        self._retry_ns = 0

    def report(self, now: Now, *, force: bool = False) -> Dropped | None:
        """Return what is to be told of the RAM ring's drops now."""
        due = now.mono_ns - self._reported_ns >= REPORT_S * NS_PER_S
        if not self.dropped.count or not (due or force):
            return None
        told, self.dropped = self.dropped, Dropped("ram")
        self._reported_ns = now.mono_ns
        return told

    def _alarm(self, now: Now, event: str, text: str) -> Draft:
        body: dict[str, Any] = {
            "alarm": "spool.flash", "event": event, "key": "", "text": text, "value": None, "limit": None,
            "unit": "", "since_ns": self._since_ns, "context": {},
        }  # fmt: skip
        return Draft("alarm", Level.ALARM, now.mono_ns, body)
