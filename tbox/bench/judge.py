"""The judge of a ride: holds what was counted at both ends against what the agent says. It runs nothing.

Frames are counted where they were written, records where they were received. The agent's own counters are
checked against these and never used in their place.
"""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tbox.model import NS_PER_MS, NS_PER_S, Level
from tbox.record.proof import ProofResult

LIVE_LATENCY_S_MAX = 5.0  # a window of one second, a poll, and a loaded machine
ALARM_LATENCY_S_MAX = 5.0
GAP_TOLERANCE_S = 5.0


class Claim(NamedTuple):
    """One line of the proof. holds None: told for information, nothing hangs on it."""

    text: str
    counted: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One record as the subscriber got it, duplicates left out."""

    wall_ns: int
    record: dict[str, Any]

    @property
    def told_wall_ns(self) -> int | None:
        """The newest instant the record tells of: a window of telemetry ends after it began."""
        if self.record["wall"] is None:
            return None
        spans_ms = [sum(series["t"]) for series in self.record["body"].get("series", ())]
        return int(self.record["wall"]) + max(spans_ms, default=0) * NS_PER_MS

    @property
    def latency_s(self) -> float | None:
        """Seconds from what the record tells of to its arrival; None where its wall time is unset."""
        told = self.told_wall_ns
        return None if told is None else (self.wall_ns - told) / NS_PER_S


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a ride left behind, from both ends and from the vehicle's own truth."""

    frames_written: int
    frames_unwritten: int
    arrivals: Sequence[Arrival]
    proof: ProofResult
    cut_wall_ns: tuple[int, int]
    told_by: Mapping[str, frozenset[str]]  # fault -> the rules any one of which tells it
    contactors_opened: int
    exit_code: int | None


def judge(evidence: Evidence) -> list[Claim]:
    """Return the proof, claim by claim."""
    stop = _stop_ledger(evidence.arrivals)
    return [
        *_frames(evidence, stop),
        *_records(evidence, stop),
        *_alarms(evidence),
        *_link(evidence),
        Claim("the daemon stopped in order", f"exit {evidence.exit_code}", evidence.exit_code == 0),
    ]


def holds(claims: Sequence[Claim]) -> bool:
    """Whether every claim that something hangs on holds."""
    return all(claim.holds is not False for claim in claims)


def _stop_ledger(arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Return the ledger in the last stop record that arrived; {} when none did."""
    ledgers = [a.record["body"]["ledger"] for a in arrivals if a.record["body"].get("event") == "stop"]
    return ledgers[-1] if ledgers else {}


def _frames(evidence: Evidence, stop: dict[str, Any]) -> list[Claim]:
    decode = stop.get("decode", {"into": 0, "out": 0, "dropped": {}})
    dropped = decode["dropped"]
    unknown, malformed = dropped.get("unknown", 0), dropped.get("malformed", 0)
    accounted = decode["out"] + unknown + malformed
    written = evidence.frames_written
    lost = sum(stop.get("bus", {"dropped": {}})["dropped"].values())
    causes = Counter(
        {f"{name}: {cause}": n for name, stage in stop.items() for cause, n in stage["dropped"].items()}
    )
    said = ", ".join(f"{n} {cause}" for cause, n in sorted(causes.items())) or "nothing"
    return [
        Claim(
            "frames written on the bus = decoded + unknown + malformed",
            f"{written} = {decode['out']} + {unknown} + {malformed}",
            written > 0 and written == accounted and evidence.frames_unwritten == 0,
        ),
        Claim("frames lost before decoding", str(lost), lost == 0 and bool(stop)),
        Claim("the agent's ledger, by cause (samples refused, windows)", said, bool(stop)),
    ]


def _records(evidence: Evidence, stop: dict[str, Any]) -> list[Claim]:
    proof = evidence.proof
    minted = stop.get("record", {"out": -1})["out"]
    # The stop record carries the ledger and so cannot count itself; what follows it was told after it.
    last = proof.starts[-1].last if proof.starts else 0
    return [
        Claim(
            "records received = ids given out",
            f"{proof.received} of {last}, {proof.duplicates} twice, {proof.missing_unexplained} missing",
            proof.ok and proof.received == last and proof.missing_explained == 0,
        ),
        Claim("records the agent says it made before the stop record", f"{minted}", minted == last - 1),
    ]


def _alarms(evidence: Evidence) -> list[Claim]:
    raised: Counter[str] = Counter()
    cleared: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for arrival in evidence.arrivals:
        body = arrival.record["body"]
        if arrival.record["kind"] == "alarm" and "alarm" in body:
            raised[body["alarm"]] += body["event"] == "raise"
            cleared[body["alarm"]] += body["event"] == "clear"
            if body["event"] == "raise":
                texts.setdefault(body["alarm"], body["text"])
    claims = [
        Claim(
            f"the fault {fault} was told as an alarm",
            _names(rules & set(+raised)),
            bool(rules & set(+raised)),
        )
        for fault, rules in evidence.told_by.items()
    ]
    if not evidence.told_by:
        claims.append(Claim("no fault, no alarm", _names(+raised), not +raised))
    claims.append(
        Claim(
            "alarms raised / cleared",
            "; ".join(f"{rule} {raised[rule]}/{cleared[rule]}" for rule in sorted(raised)) or "none",
            None,
        )
    )
    claims += [Claim(f"  {rule}", text, None) for rule, text in sorted(texts.items())]
    if evidence.told_by:
        claims.append(
            Claim(
                "the BMS heard the isolation request and opened the contactors",
                f"{evidence.contactors_opened} times",
                evidence.contactors_opened >= 1,
            )
        )
    return claims


def _link(evidence: Evidence) -> list[Claim]:
    begin, end = evidence.cut_wall_ns
    cut_s = (end - begin) / NS_PER_S
    walls = sorted(a.wall_ns for a in evidence.arrivals)
    longest_ns = max((b - a for a, b in itertools.pairwise(walls)), default=0)
    slack_ns = int(GAP_TOLERANCE_S * NS_PER_S)
    dated = [(a, told) for a in evidence.arrivals if (told := a.told_wall_ns) is not None]
    telemetry = [(a, told) for a, told in dated if a.record["kind"] == "telemetry"]
    live = [a.latency_s for a, told in telemetry if not begin - slack_ns <= told <= end + slack_ns]
    late = [a.wall_ns for a, told in dated if a.wall_ns >= end > told and a.record["level"] < Level.ALARM]
    drained_ns = max(late, default=0)
    beside = [a.latency_s for a, told in telemetry if told >= end and a.wall_ns <= drained_ns]
    alarms = [a.latency_s for a, _ in dated if a.record["level"] >= Level.ALARM]
    first_alarm_s = min(
        ((a.wall_ns - end) / NS_PER_S for a, told in dated
         if a.record["level"] >= Level.ALARM and a.wall_ns >= end > told >= begin),
        default=None,
    )  # fmt: skip
    return [
        Claim(
            "the gap: link cut silently / silence at the subscriber",
            f"{cut_s:.1f} s / {longest_ns / NS_PER_S:.1f} s",
            cut_s > 0 and longest_ns / NS_PER_S >= cut_s - GAP_TOLERANCE_S,
        ),
        Claim(
            f"live goes before backlog ({len(late)} late records in {(drained_ns - end) / NS_PER_S:.1f} s)",
            f"live records meanwhile: {_spread(beside)}",
            bool(late) and bool(beside) and _median(beside) < LIVE_LATENCY_S_MAX,
        ),
        Claim("latency of live records", _spread(live), bool(live) and _median(live) < LIVE_LATENCY_S_MAX),
        Claim("latency of alarm records (those of the gap include it)", _spread(alarms), None),
        Claim(
            "alarms of the gap arrived after coverage returned in",
            "-" if first_alarm_s is None else f"{first_alarm_s:.1f} s",
            None if first_alarm_s is None else True,
        ),
    ]


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _median(values: Sequence[float | None]) -> float:
    return statistics.median(v for v in values if v is not None)


def _spread(values: Sequence[float | None]) -> str:
    known = sorted(v for v in values if v is not None)
    if not known:
        return "none"
    high = known[min(len(known) - 1, int(len(known) * 0.95))]
    return (
        f"median {statistics.median(known):.2f} s, 95 % {high:.2f} s, most {known[-1]:.2f} s ({len(known)})"
    )


# --- updates ---------------------------------------------------------------------------------------------

CRASH_LOOP_S_MAX = 60.0  # from the first start of an image that crashes to the previous one running


@dataclass(frozen=True, slots=True)
class UpdateEvidence:
    """What the chapter of updates left behind. records: start records and those of kind ota, as they came.

    delta_bytes: 0 when none could be made. explained: records of open ticks, lost with a crash and told of.
    """

    delta_bytes: int
    image_bytes: int
    records: list[dict[str, Any]]
    received: int
    unexplained: int
    explained: int
    exit_code: int | None


def judge_updates(evidence: UpdateEvidence) -> list[Claim]:
    """Return the proof of the updates, claim by claim."""
    return [
        _claim_delta(evidence),
        _claim_trial(evidence),
        _claim_rollback(evidence),
        _claim_refusal(evidence, "update 4.0, signed by too few, refused", "signed by 2 of the 3"),
        _claim_refusal(evidence, "update 1.0, offered again, refused", "a downgrade"),
        Claim(
            "records of all starts around the updates",
            f"{evidence.received} received, {evidence.unexplained} missing, {evidence.explained} told as lost"
            " by a crash",
            evidence.received > 0 and evidence.unexplained == 0,
        ),
        Claim("the updated agent stopped in order", f"exit {evidence.exit_code}", evidence.exit_code == 0),
    ]


def _updates(evidence: UpdateEvidence, *events: str) -> list[dict[str, Any]]:
    return [r for r in evidence.records if r["kind"] == "ota" and r["body"]["event"] in events]


def _starts(evidence: UpdateEvidence, version: str) -> list[dict[str, Any]]:
    return [r for r in evidence.records if r["kind"] == "event" and r["body"].get("version") == version]


def _claim_delta(evidence: UpdateEvidence) -> Claim:
    """The first download took the delta, if there was one, and what it brought."""
    taken = [record["body"]["reason"] for record in _updates(evidence, "go")[:1]]
    installed = bool(_updates(evidence, "installed"))
    if not evidence.delta_bytes:
        return Claim("update 2.0 came", "as a whole: bsdiff4 is not installed", installed)
    said = f"{evidence.delta_bytes} bytes for an image of {evidence.image_bytes}"
    return Claim("update 2.0 came as a delta", said, installed and taken[0].endswith(".bsdiff"))


def _claim_trial(evidence: UpdateEvidence) -> Claim:
    """It waited for the parked vehicle, switched after that, and passed as the version that ran."""
    told = _updates(evidence, "held", "switch", "passed")
    waits = [r for r in told if r["body"]["reason"] == "the vehicle is not parked"]
    switches = [r for r in told if r["body"]["event"] == "switch"]
    passed = [r for r in told if r["body"]["event"] == "passed"]
    fine = bool(waits and switches and passed) and waits[0]["id"] < switches[0]["id"] < passed[0]["id"]
    runs = passed[0]["body"]["running"]["version"] if passed else "nothing"
    return Claim(
        "it waited until parked, ran on trial, proved itself", f"{runs} is good", fine and runs == "2.0"
    )


def _claim_rollback(evidence: UpdateEvidence) -> Claim:
    """The release that crashes was given up, and the one before ran again soon."""
    starts, back = _starts(evidence, "3.0"), _updates(evidence, "rolled-back")
    if not starts or not back:
        return Claim("update 3.0 crashed and was rolled back", "it was not", False)
    took_s = (back[0]["mono"] - starts[0]["mono"]) / NS_PER_S
    runs = back[0]["body"]["running"]["version"]
    return Claim(
        "update 3.0 crashed and was rolled back",
        f"{len(starts)} starts, {runs} again after {took_s:.1f} s",
        runs == "2.0" and took_s <= CRASH_LOOP_S_MAX,
    )


def _claim_refusal(evidence: UpdateEvidence, text: str, why: str) -> Claim:
    reasons = [record["body"]["reason"] for record in _updates(evidence, "refused")]
    found = [reason for reason in reasons if why in reason]
    return Claim(text, found[0] if found else "it was not", bool(found))
