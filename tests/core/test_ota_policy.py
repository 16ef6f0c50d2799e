"""Conditions may delay or refuse an update and never authorise one; what is unknown counts against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.ota import boot, policy
from tbox.ota.boot import BootControl
from tbox.ota.model import Emergency, Preconditions, VerifiedTarget, Window
from tbox.ota.policy import OtaSettings, Vitals
from tests.core.test_ota_boot import FACTORY, GOOD, TRIAL, good_entry
from tests.crash.ota_world import PARKED, target_of

SETTINGS = OtaSettings()
NEXT = target_of(b"next", 3)


def changed(vitals: Vitals, **changes: Any) -> Vitals:
    return msgspec.structs.replace(vitals, **changes)


def download(
    target: VerifiedTarget = NEXT, vitals: Vitals = PARKED, *, cohort: float = 0.0, **settings: Any
) -> str:
    own = msgspec.structs.replace(SETTINGS, **settings)
    return policy.hold_download(target, own, vitals, cohort, approved=False)


def switch(
    target: VerifiedTarget = NEXT, vitals: Vitals = PARKED, *, approved: bool = False, **settings: Any
) -> str:
    return policy.hold_switch(target, msgspec.structs.replace(SETTINGS, **settings), vitals, approved)


def admitted(target: VerifiedTarget, control: BootControl = GOOD, missing: str = "", **settings: Any) -> str:
    own = msgspec.structs.replace(SETTINGS, **settings)
    return policy.not_admitted(target, control, "b", own, lambda requires: missing, "raw")


@pytest.mark.parametrize(
    ("clock", "inside"),
    [("21:59", False), ("22:00", True), ("00:00", True), ("05:59", True), ("06:00", False), ("12:00", False)],
)
def test_the_off_peak_window_reaches_past_midnight(clock: str, inside: bool) -> None:
    minute = int(clock[:2]) * 60 + int(clock[3:])
    held = download(vitals=changed(PARKED, local_minute=minute))
    assert (held == "") is inside
    assert inside or held == "waiting for 22:00 to 06:00"


@pytest.mark.parametrize("minute", [0, 359, 360, 720, 1439, None])
def test_a_window_that_ends_as_it_begins_is_the_whole_day_and_needs_no_clock(minute: int | None) -> None:
    always = Window(begin_minute=360, end_minute=360)
    assert download(vitals=changed(PARKED, local_minute=minute), window=always) == ""
    narrow = target_of(b"next", 3, window=Window(begin_minute=120, end_minute=180))
    held = download(narrow, changed(PARKED, local_minute=minute), window=always)
    assert held == ("local time is unknown" if minute is None else "waiting for 02:00 to 03:00")


def test_a_critical_update_ignores_the_window_but_nothing_else() -> None:
    critical = target_of(b"next", 3, critical=True)
    noon = changed(PARKED, local_minute=720)
    assert download(critical, noon) == ""
    assert download(critical, changed(noon, local_minute=None)) == ""
    assert download(critical, changed(noon, bearer="ntn")) == "not over ntn"


def test_the_signed_window_only_makes_it_stricter() -> None:
    narrow = target_of(b"next", 3, window=Window(begin_minute=120, end_minute=180))
    assert download(narrow, changed(PARKED, local_minute=150)) == ""
    assert download(narrow, changed(PARKED, local_minute=23 * 60)) == "waiting for 02:00 to 03:00"
    noon = target_of(b"next", 3, window=Window(begin_minute=700, end_minute=800))
    assert download(noon, changed(PARKED, local_minute=720)) == "waiting for 22:00 to 06:00"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bearer": "ntn"}, "not over ntn"),
        ({"bearer": "none"}, "no bearer"),
        ({"disk_free_bytes": 1000}, "free disk"),
        ({"disk_free_bytes": None}, "free disk"),
        ({"local_minute": None}, "local time is unknown"),
    ],
)
def test_a_download_waits_for(change: dict[str, Any], reason: str) -> None:
    assert reason in download(vitals=changed(PARKED, **change))


def test_bearers_are_the_device_s_to_choose_and_ntn_never_is() -> None:
    assert download(vitals=changed(PARKED, bearer="cellular"), bearers=("wifi",)) == "not over cellular"
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"bearers": ["ntn"]}, OtaSettings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parked": False}, "not parked"),
        ({"parked": None}, "unknown whether parked"),
        ({"soc_percent": 24.9}, "charge below 25 %, recovery included"),
        ({"soc_percent": None}, "charge below"),
        ({"soc_percent": float("nan")}, "charge below"),
        ({"low_voltage_mv": 11_799}, "12 V supply below 11800 mV"),
        ({"low_voltage_mv": None}, "12 V supply"),
        ({"alarm_level": 3}, "alarm of level 3"),
    ],
)
def test_the_switch_waits_for(change: dict[str, Any], reason: str) -> None:
    assert switch() == ""
    assert reason in switch(vitals=changed(PARKED, **change))


def test_signed_preconditions_add_to_the_device_s_own() -> None:
    demanding = target_of(
        b"next", 3, preconditions=Preconditions(soc_percent_min=50, low_voltage_mv_min=12_500)
    )
    assert "55 %" in switch(demanding, changed(PARKED, soc_percent=54.0))
    assert "12500 mV" in switch(demanding, changed(PARKED, low_voltage_mv=12_400))
    lax = target_of(b"next", 3, preconditions=Preconditions(soc_percent_min=0, low_voltage_mv_min=0))
    assert "25 %" in switch(lax, changed(PARKED, soc_percent=10.0))


def test_approval_is_asked_for_by_either_side_and_authorises_nothing_by_itself() -> None:
    asking = target_of(b"next", 3, preconditions=Preconditions(consent=True))
    assert "approval" in switch(asking) and "approval" in switch(consent=True)
    assert switch(asking, approved=True) == ""
    assert "not parked" in switch(asking, changed(PARKED, parked=False), approved=True)
    assert "approval" in download(asking)


@given(st.binary(min_size=1, max_size=32), st.text(max_size=20), st.text(max_size=20))
def test_a_vehicle_s_place_in_a_cohort_is_fixed_and_in_range(key: bytes, vehicle: str, release: str) -> None:
    point = policy.cohort_point(key, vehicle, release)
    assert 0 <= point < 100 and point == policy.cohort_point(key, vehicle, release)


def test_cohorts_grow_by_their_share_and_never_lose_a_vehicle() -> None:
    points = [policy.cohort_point(b"key", f"vehicle{i}", "release") for i in range(4000)]
    for percent in (1, 5, 15, 100):
        share = sum(point < percent for point in points) / 40
        assert abs(share - percent) <= 1.5
    one = [target_of(b"next", 3, cohort_percent=percent) for percent in (1, 5, 15, 100)]
    for point in points[:200]:
        inside = [download(target, cohort=point) == "" for target in one]
        assert inside == sorted(inside) and inside[-1]


def test_nobody_is_in_a_cohort_of_nothing() -> None:
    assert "cohort" in download(target_of(b"next", 3, cohort_percent=0.0), cohort=0.0)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (target_of(b"next", 3, hardware_ids=("another",)), "for hardware another"),
        (
            target_of(b"next", 3, kind="app"),
            "of kind app, and the boot loader here starts",
        ),
        (target_of(b"new", 2), "runs already"),
        (target_of(b"other", 2), "a downgrade"),
        (target_of(b"old", 1), "a downgrade"),
        (target_of(b"", 3), "do not fit"),
    ],
)
def test_an_image_is_refused_for(target: VerifiedTarget, reason: str) -> None:
    assert reason in admitted(target)


def test_what_failed_here_before_is_not_tried_again() -> None:
    control = boot.activate(FACTORY, "a").with_slots("b", TRIAL.b)
    failed = boot.fail(control, "b", "crashed")
    assert (
        policy.not_admitted(target_of(b"new", 2), failed, "a", SETTINGS, lambda _: "", "raw")
        == "was given up before: crashed"
    )


def test_a_downgrade_needs_a_signed_emergency_that_still_holds() -> None:
    permitted = target_of(b"old", 1, emergency=Emergency(floor_max=2, reason="2 drains the battery"))
    assert admitted(permitted) == ""
    high = msgspec.structs.replace(GOOD, floor=3)
    assert "downgrade" in admitted(permitted, high)


def test_a_counter_below_the_running_one_is_a_downgrade_even_if_the_floor_is_lost() -> None:
    control = BootControl(b=good_entry(target_of(b"run", 7)))
    assert "not above 7" in admitted(target_of(b"next", 7), control)


def test_too_big_and_lacking_what_it_needs() -> None:
    assert "do not fit" in admitted(NEXT, slot_bytes_max=3)
    assert admitted(NEXT, missing="requires python>=4") == "requires python>=4"


INSTALLED = {"python": "3.11.2", "numpy": "2.4.0", "python-can": "4.6.1", "platform": "linux-aarch64"}


@pytest.mark.parametrize(
    "text",
    [
        "python>=3.11",
        "python >= 3.11, <3.14",
        "numpy==2.4.0",
        "Python_Can>4",
        "platform==linux-aarch64",
        "numpy",
        "numpy!=1",
    ],
)
def test_a_requirement_is_met(text: str) -> None:
    assert policy.missing_requirement([text], INSTALLED) == ""


@pytest.mark.parametrize(
    "text",
    ["python>=3.12", "python>=3.11,<3.11.2", "scipy", "numpy==2.4", "numpy>=2.10", "platform==linux-x86_64",
     "numpy>=", "numpy=>2", "; rm -rf", "", "numpy>=x"],
)  # fmt: skip
def test_a_requirement_is_not_met_or_not_readable(text: str) -> None:
    assert policy.missing_requirement(["numpy", text], INSTALLED) != ""


@given(st.lists(st.text(max_size=30), max_size=3))
def test_no_requirement_crashes_the_check(requires: list[str]) -> None:
    check: Callable[..., str] = policy.missing_requirement
    assert isinstance(check(requires, INSTALLED), str)
