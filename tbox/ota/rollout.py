"""The publisher's rollout: widens a release's cohort step by step, halts it when vehicles report crashes.

A core: outcomes and the time come in, a decision goes out. Halting is for good until a person resumes it,
and orders the image to be left. It never widens beyond what the release itself was signed for.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tbox.ota.model import RollbackOrder, Sha256
from tbox.ota.releases import ORDERS_MAX, RELEASES_MAX, Notice

# Cohorts of 1 and 5 %, then 15 %, then all; halt at 2 % of the vehicles within 15 min (FACTS, Updates).
STAGES_BASIS_POINTS = (100, 500, 1500, 10_000)
OUTCOMES_MAX = 2_000_000

Share = Annotated[float, Meta(gt=0, le=100)]
Seconds = Annotated[int, Meta(ge=0, le=90 * 86_400)]


class RolloutSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When to go on and when to stop."""

    halt_percent: Share = 2.0  # of the vehicles that took the image, failing within
    halt_window_s: Seconds = 15 * 60
    halt_vehicles_min: Annotated[int, Meta(ge=1)] = 2  # one vehicle alone is no trend
    soak_s: Seconds = 24 * 3600  # how long a stage lasts at least
    good_vehicles_min: Annotated[int, Meta(ge=1)] = 1
    good_percent_min: Annotated[float, Meta(ge=0, le=100)] = 90.0  # of those with a verdict


class Kind(Enum):
    TRIED = "tried"
    GOOD = "good"
    FAILED = "failed"


class Outcome(NamedTuple):
    """What one vehicle said of one image; at_s: when it said so, as the publisher's clock has it."""

    vehicle: str
    sha256: str
    kind: Kind
    at_s: float


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far one image has come. halted: why, "" while it goes on. from_s: what was said before is past."""

    sha256: Sha256
    stage: Annotated[int, Meta(ge=0, lt=len(STAGES_BASIS_POINTS))] = 0
    since_s: float = 0.0
    halted: str = ""
    from_s: float = 0.0

    @property
    def basis_points(self) -> int:
        return 0 if self.halted else STAGES_BASIS_POINTS[self.stage]


class Tally(NamedTuple):
    """Vehicles, each once: that tried the image, found it good, gave it up; and the worst window."""

    tried: int
    good: int
    failed: int
    worst_failed: int

    @property
    def worst_percent(self) -> float:
        return 100 * self.worst_failed / self.tried if self.tried else 0.0


def tally(outcomes: Iterable[Outcome], sha256: str, window_s: float, from_s: float = 0.0) -> Tally:
    """Count what vehicles said of an image since from_s; a later verdict of one replaces an earlier one."""
    verdict: dict[str, Kind] = {}
    failed_at: dict[str, float] = {}
    for outcome in sorted(
        (o for o in outcomes if o.sha256 == sha256 and o.at_s >= from_s), key=lambda o: o.at_s
    ):
        if outcome.kind is Kind.TRIED:
            verdict.setdefault(outcome.vehicle, Kind.TRIED)
            continue
        verdict[outcome.vehicle] = outcome.kind
        if outcome.kind is Kind.FAILED:
            failed_at.setdefault(outcome.vehicle, outcome.at_s)
    kinds = list(verdict.values())
    times = sorted(failed_at.values())
    return Tally(len(kinds), kinds.count(Kind.GOOD), kinds.count(Kind.FAILED), _most_within(times, window_s))


def _most_within(times: list[float], window_s: float) -> int:
    """Return the largest number of these (sorted) that lie within one window."""
    most = begin = 0
    for end, time in enumerate(times):
        while time - times[begin] > window_s:
            begin += 1
        most = max(most, end - begin + 1)
    return most


class Step(Enum):
    WAIT = "wait"
    ADVANCE = "advance"
    HALT = "halt"
    DONE = "done"


class Decision(NamedTuple):
    step: Step
    progress: Progress
    why: str


def decide(progress: Progress, counted: Tally, now_s: float, settings: RolloutSettings) -> Decision:
    """Return what becomes of a rollout, in the order of these lines."""
    if progress.halted:
        return Decision(Step.HALT, progress, progress.halted)
    if counted.worst_failed >= settings.halt_vehicles_min and counted.worst_percent >= settings.halt_percent:
        why = (
            f"{counted.worst_failed} of {counted.tried} vehicles gave it up within"
            f" {settings.halt_window_s // 60} min"
        )
        return Decision(Step.HALT, replace(progress, halted=why), why)
    if progress.stage == len(STAGES_BASIS_POINTS) - 1:
        return Decision(Step.DONE, progress, "every vehicle may take it")
    left_s = progress.since_s + settings.soak_s - now_s
    if left_s > 0:
        return Decision(Step.WAIT, progress, f"this stage lasts {left_s / 3600:.1f} h longer")
    judged = counted.good + counted.failed
    if counted.good < settings.good_vehicles_min:
        return Decision(Step.WAIT, progress, f"{counted.good} vehicles found it good so far")
    if 100 * counted.good < settings.good_percent_min * judged:
        return Decision(Step.WAIT, progress, f"{counted.failed} of {judged} vehicles gave it up")
    after = replace(progress, stage=progress.stage + 1, since_s=now_s)
    return Decision(Step.ADVANCE, after, f"to {after.basis_points / 100:g} %")


def resume(progress: Progress, now_s: float) -> Progress:
    """Take a halted rollout up again at its first stage: a person has looked at all that was said so far."""
    return Progress(sha256=progress.sha256, since_s=now_s, from_s=now_s)


def notice_with(notice: Notice, progress: Progress) -> Notice:
    """Return the notice with this image's cohort, and with the order to leave it when it was halted."""
    points = {progress.sha256: progress.basis_points} | {
        sha256: value for sha256, value in notice.basis_points.items() if sha256 != progress.sha256
    }
    kept = [order for order in notice.orders if order.leave_sha256 != progress.sha256]
    if progress.halted:
        kept.append(RollbackOrder(leave_sha256=progress.sha256, reason=progress.halted))
    bounded = dict(list(points.items())[:RELEASES_MAX])
    return Notice(basis_points=bounded, orders=tuple(kept[-ORDERS_MAX:]))


# --- from the records that vehicles send -----------------------------------------------------------------

_TRIED, _GOOD, _FAILED = {"trial", "switch"}, {"good", "passed"}, {"failed", "rolled-back"}


class Reports:
    """Turns the `ota` records of many vehicles, each vehicle's in order, into outcomes."""

    def __init__(self) -> None:
        self._switched_to: dict[str, str] = {}

    def outcome(self, vehicle: str, body: dict[str, Any], at_s: float) -> Outcome | None:
        """Return what a record's body says of an image, None when it says nothing of one.

        A device back on its old image no longer knows the one it left; the last switch it told of does.
        """
        event = str(body.get("event"))
        running = _sha256_in(body.get("running"))
        if event == "switch":
            self._switched_to[vehicle] = _sha256_in(body.get("target"))
            return Outcome(vehicle, self._switched_to[vehicle], Kind.TRIED, at_s)
        if event in _TRIED or event in _GOOD or event == "failed":
            sha256 = running
        elif event == "rolled-back":
            sha256 = self._switched_to.get(vehicle, "")
        else:
            return None
        kind = Kind.GOOD if event in _GOOD else Kind.FAILED if event in _FAILED else Kind.TRIED
        return Outcome(vehicle, sha256, kind, at_s) if sha256 else None


def _sha256_in(image: object) -> str:
    """Return the digest an image is named by; "" for whatever else a vehicle wrote there."""
    return str(image.get("sha256", "")) if isinstance(image, dict) else ""
