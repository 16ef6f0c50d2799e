"""A ring of full-rate frames, sealed into capture records around an alarm. Never writes a file."""

from __future__ import annotations

from typing import Any

import msgspec

from tbox.ledger import StageLedger
from tbox.model import Draft, FrameBatch, Now


class BlackBoxSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is kept, and how much of it an alarm seals."""


class BlackBox:
    """Keeps the last seconds of frames; `trigger` seals them and what follows.

    account: ledger.stage("blackbox", "frames"), opened by the caller.
    """

    def __init__(self, account: StageLedger, settings: BlackBoxSettings | None = None) -> None:
        self._account = account

    def step(self, now: Now, frames: FrameBatch | None) -> list[Draft]:
        """Take the frames in; return the capture parts that are due (a bounded number a step)."""
        return []

    def trigger(self, now: Now, alarm: Draft) -> list[Draft]:
        """Begin a capture for an alarm draft of level 3 or more, or extend the open one; others are ignored."""
        return []

    def clear(self, now: Now, alarm: Draft) -> None:
        """The alarm (same "alarm" and "key") is over: when none is left the open capture ends."""

    def flush(self, now: Now) -> list[Draft]:
        """Seal what is open, at stop."""
        return []

    def status(self) -> dict[str, Any]:
        """Return ring bytes, frames, seconds, and the open capture's number or None."""
        return {}
