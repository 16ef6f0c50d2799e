"""Journeys and charge sessions as records: what was driven, charged and used. Never counts a frame."""

from __future__ import annotations

from typing import Any

import msgspec

from tbox.edge.mode import Context
from tbox.model import Draft, Now, PackSnapshot


class JourneySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a charge counts as complete, stalled or odd."""


class Journeys:
    """Sums up each journey and each charge session; tells of charges that do not happen."""

    def __init__(self, settings: JourneySettings | None = None) -> None:
        self._settings = settings or JourneySettings()

    def step(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        """Return journey records (start, update, end) and events."""
        return []

    def flush(self, now: Now) -> list[Draft]:
        """End what is open, at stop; the record says so."""
        return []

    def status(self) -> dict[str, Any] | None:
        """Return the open journey or charge session so far as plain values, or None."""
        return None
