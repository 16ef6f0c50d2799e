"""The loss ledger: at every stage `in = out + held + folded + dropped{cause}`. It counts and never decides.

Each stage counts in its own unit (frames, samples, records). A stage's numbers belong to the thread that
owns the stage; a reader in another thread takes `snapshot()`, whose balance is only exact between steps.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict


class LedgerImbalance(Exception):
    """A stage lost or invented something: a bug, never the world."""


class StageTotals(TypedDict):
    unit: str
    into: int
    out: int
    held: int
    folded: int
    dropped: dict[str, int]


@dataclass(slots=True)
class StageLedger:
    """One stage's account. `held` is what the stage has taken in and not yet given on.

    Add to `into` before the work and to the rest after it; `check()` between steps.
    """

    name: str
    unit: str
    into: int = 0
    out: int = 0
    held: int = 0
    folded: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, cause: str, n: int = 1) -> None:
        if n:
            self.dropped[cause] += n

    @property
    def balance(self) -> int:
        """What is unaccounted for: 0, or there is a bug."""
        return self.into - self.out - self.held - self.folded - sum(self.dropped.values())

    def check(self) -> None:
        """Raise LedgerImbalance unless every unit taken in is accounted for."""
        if self.balance:
            raise LedgerImbalance(f"{self.name}: {self.balance} {self.unit} unaccounted for: {self.totals()}")

    def totals(self) -> StageTotals:
        return StageTotals(
            unit=self.unit, into=self.into, out=self.out, held=self.held, folded=self.folded,
            dropped=dict(self.dropped),
        )  # fmt: skip


class Ledger:
    """All stages' accounts of one start, in the order of the flow."""

    def __init__(self) -> None:
        self._stages: dict[str, StageLedger] = {}

    def stage(self, name: str, unit: str) -> StageLedger:
        """Open the account of a stage; a name is opened once."""
        assert name not in self._stages, name
        return self._stages.setdefault(name, StageLedger(name, unit))

    def check(self) -> None:
        """Raise LedgerImbalance if any stage is out of balance."""
        for stage in self._stages.values():
            stage.check()

    def snapshot(self) -> dict[str, StageTotals]:
        return {name: stage.totals() for name, stage in self._stages.items()}
