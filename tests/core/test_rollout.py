"""A rollout widens step by step, stops when vehicles report crashes, and never goes on by itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.ota.model import RollbackOrder
from tbox.ota.releases import Notice
from tbox.ota.rollout import (
    STAGES_BASIS_POINTS,
    Kind,
    Outcome,
    Progress,
    Reports,
    RolloutSettings,
    Step,
    Tally,
    decide,
    notice_with,
    resume,
    tally,
)

IMAGE, OTHER = "a" * 64, "b" * 64
SETTINGS = RolloutSettings()
DAY_S, MINUTE_S = 86_400.0, 60.0


def outcomes(
    kind: Kind, count: int, at_s: float = 0.0, first: int = 0, apart_s: float = 0.0
) -> list[Outcome]:
    return [Outcome(f"v{first + n}", IMAGE, kind, at_s + n * apart_s) for n in range(count)]


def counted(*parts: list[Outcome]) -> Tally:
    return tally([outcome for part in parts for outcome in part], IMAGE, SETTINGS.halt_window_s)


def test_a_healthy_rollout_goes_through_every_cohort_and_is_done() -> None:
    progress, seen, now_s = Progress(sha256=IMAGE), [], 0.0
    good = counted(outcomes(Kind.TRIED, 100), outcomes(Kind.GOOD, 100, 1))
    for _ in range(20):
        step, progress, _ = decide(progress, good, now_s, SETTINGS)
        if step is Step.DONE:
            break
        if step is Step.ADVANCE:
            seen.append((now_s / DAY_S, progress.basis_points))
        now_s += DAY_S / 2
    assert step is Step.DONE
    assert seen == list(enumerate(STAGES_BASIS_POINTS[1:], 1))  # a day in each cohort before the next


@pytest.mark.parametrize(
    ("failed", "apart_s", "halts"),
    [
        (1, 0.0, False),  # one vehicle alone is no trend
        (2, 0.0, True),  # 2 of 100
        (2, 14 * MINUTE_S, True),
        (2, 16 * MINUTE_S, False),  # not within a quarter of an hour
        (5, 10 * MINUTE_S, True),  # any two of them are
        (5, 20 * MINUTE_S, False),
    ],
)
def test_two_percent_within_a_quarter_of_an_hour_halt_it(failed: int, apart_s: float, halts: bool) -> None:
    found = counted(outcomes(Kind.TRIED, 100), outcomes(Kind.FAILED, failed, 1000, apart_s=apart_s))
    step, progress, why = decide(Progress(sha256=IMAGE), found, DAY_S / 2, SETTINGS)
    assert (step is Step.HALT) is halts
    assert bool(progress.halted) is halts
    if halts:
        assert why.endswith("of 100 vehicles gave it up within 15 min")
        assert progress.basis_points == 0


def test_a_share_below_the_limit_does_not_halt() -> None:
    found = counted(outcomes(Kind.TRIED, 1000), outcomes(Kind.FAILED, 19, 5))
    assert decide(Progress(sha256=IMAGE), found, 0, SETTINGS).step is Step.WAIT


def test_a_halt_lasts_until_a_person_resumes_it() -> None:
    bad = counted(outcomes(Kind.TRIED, 10), outcomes(Kind.FAILED, 5, 5))
    _, halted, _ = decide(Progress(sha256=IMAGE, stage=2), bad, 10, SETTINGS)
    good = counted(outcomes(Kind.TRIED, 1000), outcomes(Kind.GOOD, 1000, 9))
    assert decide(halted, good, 100 * DAY_S, SETTINGS).step is Step.HALT
    assert resume(halted, 5.0) == Progress(sha256=IMAGE, stage=0, since_s=5.0, from_s=5.0)


def test_what_was_said_before_a_rollout_was_resumed_is_past() -> None:
    said = [*outcomes(Kind.TRIED, 100), *outcomes(Kind.FAILED, 3, 1000), *outcomes(Kind.GOOD, 50, 5000)]
    assert tally(said, IMAGE, 900, 1000).worst_failed == 3
    assert tally(said, IMAGE, 900, 1000.5) == Tally(50, 50, 0, 0)
    resumed = resume(Progress(sha256=IMAGE, halted="crashes"), 1001)
    assert tally(said, IMAGE, 900, resumed.from_s).failed == 0


def test_it_waits_for_verdicts_and_for_enough_good_ones() -> None:
    progress = Progress(sha256=IMAGE)
    nothing = decide(progress, counted(outcomes(Kind.TRIED, 50)), 2 * DAY_S, SETTINGS)
    assert nothing.step is Step.WAIT and "0 vehicles found it good" in nothing.why
    slowly = counted(outcomes(Kind.GOOD, 80), outcomes(Kind.FAILED, 20, 0, 80, apart_s=3600))
    assert decide(progress, slowly, 2 * DAY_S, SETTINGS).why == "20 of 100 vehicles gave it up"


def test_a_vehicle_counts_once_whatever_it_says_and_in_whatever_order_that_comes() -> None:
    found = counted(
        outcomes(Kind.FAILED, 1, 3), outcomes(Kind.TRIED, 1, 1), outcomes(Kind.FAILED, 1, 2),
        outcomes(Kind.GOOD, 1, 4),
    )  # fmt: skip
    assert found == Tally(tried=1, good=1, failed=0, worst_failed=1)
    assert tally([Outcome("v", OTHER, Kind.FAILED, 0)], IMAGE, 900) == Tally(0, 0, 0, 0)


@given(st.lists(st.floats(0, 10_000), max_size=30), st.floats(1, 2000))
def test_the_worst_window_is_what_trying_every_window_finds(times: list[float], window_s: float) -> None:
    found = tally([Outcome(f"v{n}", IMAGE, Kind.FAILED, t) for n, t in enumerate(times)], IMAGE, window_s)
    brute = max((sum(begin <= t and t - begin <= window_s for t in times) for begin in times), default=0)
    assert found.worst_failed == brute


def test_the_notice_names_the_cohort_and_the_order_to_leave() -> None:
    before = Notice(basis_points={OTHER: 500, IMAGE: 100})
    going = notice_with(before, Progress(sha256=IMAGE, stage=1))
    assert going == Notice(basis_points={IMAGE: 500, OTHER: 500})
    halted = notice_with(going, Progress(sha256=IMAGE, stage=1, halted="it crashes"))
    assert halted.basis_points == {IMAGE: 0, OTHER: 500}
    assert halted.orders == (RollbackOrder(leave_sha256=IMAGE, reason="it crashes"),)
    assert notice_with(halted, Progress(sha256=IMAGE)).orders == ()


def test_the_notice_stays_within_its_bounds() -> None:
    notice = Notice()
    for number in range(40):
        notice = notice_with(notice, Progress(sha256=f"{number:064x}", halted="bad"))
    assert len(notice.orders) == 16
    assert notice.orders[-1].leave_sha256 == f"{39:064x}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"event": "switch", "target": {"sha256": IMAGE}}, (IMAGE, Kind.TRIED)),
        ({"event": "trial", "running": {"sha256": IMAGE}}, (IMAGE, Kind.TRIED)),
        ({"event": "good", "running": {"sha256": IMAGE}}, (IMAGE, Kind.GOOD)),
        ({"event": "passed", "running": {"sha256": IMAGE}}, (IMAGE, Kind.GOOD)),
        ({"event": "failed", "running": {"sha256": IMAGE}}, (IMAGE, Kind.FAILED)),
        ({"event": "held", "target": {"sha256": IMAGE}}, None),
        ({"event": "rolled-back", "running": {"sha256": OTHER}}, None),  # from what, it never said
        ({}, None),
    ],
)
def test_what_a_vehicle_reports_is_understood(
    body: dict[str, Any], expected: tuple[str, Kind] | None
) -> None:
    found = Reports().outcome("v", body, 7.0)
    assert found == (Outcome("v", *expected, 7.0) if expected else None)


def test_a_vehicle_back_on_its_old_image_has_failed_the_one_it_last_switched_to() -> None:
    reports = Reports()
    reports.outcome("v", {"event": "switch", "target": {"sha256": IMAGE}}, 1.0)
    found = reports.outcome("v", {"event": "rolled-back", "running": {"sha256": OTHER}}, 2.0)
    assert found == Outcome("v", IMAGE, Kind.FAILED, 2.0)
    assert reports.outcome("w", {"event": "rolled-back"}, 3.0) is None


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            "event": ANY_JSON | st.sampled_from(["switch", "trial", "good", "failed", "rolled-back"]),
            "target": ANY_JSON | st.fixed_dictionaries({"sha256": ANY_JSON}),
            "running": ANY_JSON | st.fixed_dictionaries({"sha256": ANY_JSON}),
        },
    )
)
def test_whatever_a_vehicle_writes_is_an_outcome_or_none(body: dict[str, Any]) -> None:
    found = Reports().outcome("v", body, 1.0)
    assert found is None or (found.vehicle == "v" and isinstance(found.sha256, str))
