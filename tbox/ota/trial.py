"""Judges a new image on trial by its software alone. A core: observations come in, a verdict goes out.

No coverage pauses its clock, a silent bus too, and a battery alarm suspends the verdict: none of these is
the software's fault. A verdict is final.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from tbox.model import NS_PER_S
from tbox.ota.policy import ALARM_LEVEL_BLOCKING, OtaSettings


class Verdict(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    PASSED = "passed"
    FAILED = "failed"


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent can show for itself since it started, as values.

    covered: the link has coverage. bus_alive: frames arrive. decoding: frames become samples.
    spool_writable: the last commit went to flash. acked: the broker acknowledged a record of this start.
    ledger_clean: every stage balances, and nothing was dropped that the rules do not allow.
    """

    covered: bool
    bus_alive: bool
    decoding: bool
    spool_writable: bool
    acked: bool
    ledger_clean: bool
    alarm_level: int = 0


class TrialJudge:
    """One trial from the start of the process on. Being asked at all shows that the process is up."""

    def __init__(self, settings: OtaSettings) -> None:
        self._settings = settings
        self._last_ns: int | None = None
        self._counted_ns = 0
        self._down_ns: dict[str, int] = {}
        self.verdict = Verdict.RUNNING
        self.reason = ""

    @property
    def counted_s(self) -> float:
        """Seconds of trial so far, pauses left out."""
        return self._counted_ns / NS_PER_S

    def step(self, mono_ns: int, proof: Proof) -> Verdict:
        """Take one look, at least every few seconds; return the verdict so far."""
        if self.verdict in (Verdict.PASSED, Verdict.FAILED):
            return self.verdict
        elapsed = mono_ns - (self._last_ns if self._last_ns is not None else mono_ns)
        self._last_ns = mono_ns
        if proof.alarm_level >= ALARM_LEVEL_BLOCKING:
            self.verdict, self.reason = Verdict.SUSPENDED, f"alarm of level {proof.alarm_level}"
            return self.verdict
        if not proof.ledger_clean:
            return self._fail("the loss ledger does not balance")
        if not (proof.covered and proof.bus_alive):
            self.verdict = Verdict.PAUSED
            self.reason = "no coverage" if not proof.covered else "the bus is silent"
            return self.verdict
        self._counted_ns += elapsed
        return self._judge(elapsed, self._failings(proof))

    def _failings(self, proof: Proof) -> list[str]:
        shown = {
            "frames are not decoded": proof.decoding,
            "the spool is not writable": proof.spool_writable,
            "no record was acknowledged": proof.acked,
        }
        return [failing for failing, fine in shown.items() if not fine]

    def _judge(self, elapsed_ns: int, failings: list[str]) -> Verdict:
        self._down_ns = {failing: self._down_ns.get(failing, 0) + elapsed_ns for failing in failings}
        longest = max(self._down_ns.values(), default=0)
        if longest > self._settings.trial_grace_s * NS_PER_S:
            return self._fail(", ".join(failings))
        if self.counted_s >= self._settings.trial_crash_free_s and not failings:
            self.verdict, self.reason = Verdict.PASSED, ""
        elif self.counted_s >= self._settings.trial_limit_s:
            return self._fail(", ".join(failings) or "no verdict in time")
        else:
            self.verdict, self.reason = Verdict.RUNNING, ", ".join(failings)
        return self.verdict

    def _fail(self, reason: str) -> Verdict:
        self.verdict, self.reason = Verdict.FAILED, reason
        return self.verdict
