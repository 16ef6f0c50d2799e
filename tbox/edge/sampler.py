"""Folds samples into windows by driving mode and lays them out as telemetry; never judges a value."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tbox.edge.mode import Context
from tbox.ledger import StageLedger
from tbox.model import Draft, Now, SampleBatch, Signal


class SamplerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How finely each driving mode is sampled."""


class Sampler:
    """Windows of min, max, mean and last for every catalog signal; on-change rows for states.

    account: ledger.stage("sampler", "samples"), opened by the caller.
    """

    def __init__(
        self, catalog: Sequence[Signal], account: StageLedger, settings: SamplerSettings | None = None
    ) -> None:
        self._account = account

    def step(self, now: Now, samples: SampleBatch, context: Context) -> list[Draft]:
        """Fold a batch; return the telemetry records that are complete. Called with an empty batch too."""
        return []

    def flush(self, now: Now, context: Context) -> list[Draft]:
        """Return everything held as records, however short."""
        return []
