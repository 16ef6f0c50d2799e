"""Own estimates of state of charge and health, to hold against the BMS's. Never replaces the BMS's figures."""

from __future__ import annotations

from typing import Any

import msgspec

from tbox.edge.mode import Context
from tbox.model import Draft, Now, PackSnapshot


class EstimatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pack's capacity and open-circuit curve, and how far the BMS may be off before it is told."""


class Estimators:
    """SOC by coulomb counting corrected at rest, SOH by a Kalman filter on the capacity between rests."""

    def __init__(self, settings: EstimatorSettings | None = None) -> None:
        self._settings = settings or EstimatorSettings()

    def step(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        """Return an event when own and BMS figures part for long, and when they agree again."""
        return []

    def status(self) -> dict[str, Any]:
        """Return soc_percent, soc_sigma, soh_percent, soh_sigma (None while unknown)."""
        return {}
