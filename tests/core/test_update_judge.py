"""The judge of the demo's updates: it believes a good chapter, and catches each way one can go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tbox.bench.judge import UpdateEvidence, holds, judge_updates
from tbox.model import NS_PER_S

Records = list[dict[str, Any]]


def ota(number: int, event: str, reason: str = "", running: str = "1.0", at_s: float = 0.0) -> dict[str, Any]:
    body = {"event": event, "reason": reason, "running": {"version": running}}
    return {"id": number, "kind": "ota", "mono": int(at_s * NS_PER_S), "body": body}


def start(number: int, version: str, at_s: float) -> dict[str, Any]:
    body = {"event": "start", "version": version}
    return {"id": number, "kind": "event", "mono": int(at_s * NS_PER_S), "body": body}


RECORDS = [
    ota(1, "go", "app/2.0.img.zst.from-1.bsdiff"),
    ota(2, "installed"),
    ota(3, "held", "the vehicle is not parked"),
    ota(4, "switch"),
    start(5, "2.0", 8.0),
    ota(6, "passed", running="2.0"),
    start(7, "3.0", 10.0),
    start(8, "3.0", 13.0),
    ota(9, "rolled-back", "out of tries", running="2.0", at_s=20.0),
    ota(10, "refused", "targets.json: signed by 2 of the 3 keys it takes", running="2.0"),
    ota(11, "refused", "security counter 1 is not above 2: a downgrade", running="2.0"),
]
GOOD = UpdateEvidence(
    delta_bytes=160, image_bytes=1_000_000, records=RECORDS, received=50, unexplained=0, explained=1,
    exit_code=0,
)  # fmt: skip


def without(number: int) -> Records:
    return [record for record in RECORDS if record["id"] != number]


def instead(record: dict[str, Any]) -> Records:
    return [record if old["id"] == record["id"] else old for old in RECORDS]


def test_a_good_chapter_holds() -> None:
    claims = judge_updates(GOOD)
    assert holds(claims) and len(claims) == 7
    assert "2 starts, 2.0 again after 10.0 s" in [claim.counted for claim in claims]
    whole = replace(GOOD, delta_bytes=0, records=instead(ota(1, "go", "app/2.0.img.zst")))
    assert holds(judge_updates(whole))


BAD: dict[str, Callable[[], UpdateEvidence]] = {
    "the delta was there and not taken": lambda: replace(GOOD, records=instead(ota(1, "go", "app/2.img"))),
    "nothing was installed": lambda: replace(GOOD, records=without(2)),
    "it did not wait until parked": lambda: replace(GOOD, records=without(3)),
    "it switched while driving": lambda: replace(
        GOOD, records=[*without(3), ota(5, "held", "the vehicle is not parked")]
    ),
    "it never passed": lambda: replace(GOOD, records=without(6)),
    "the old one passed": lambda: replace(GOOD, records=instead(ota(6, "passed", running="1.0"))),
    "the bad one stayed": lambda: replace(GOOD, records=without(9)),
    "the way back took minutes": lambda: replace(
        GOOD, records=instead(ota(9, "rolled-back", running="2.0", at_s=90.0))
    ),
    "back on the wrong one": lambda: replace(
        GOOD, records=instead(ota(9, "rolled-back", running="1.0", at_s=20.0))
    ),
    "too few keys were enough": lambda: replace(GOOD, records=without(10)),
    "an older one came in": lambda: replace(GOOD, records=without(11)),
    "a record is missing": lambda: replace(GOOD, unexplained=1),
    "no record came": lambda: replace(GOOD, received=0),
    "it did not stop in order": lambda: replace(GOOD, exit_code=1),
    "nothing happened": lambda: replace(GOOD, records=[]),
}


@pytest.mark.parametrize("name", BAD)
def test_it_catches_that(name: str) -> None:
    assert not holds(judge_updates(BAD[name]()))
