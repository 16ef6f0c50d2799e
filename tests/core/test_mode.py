"""Tests of the driving mode: the table, its hysteresis and journey ids; no clock, no files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.mode import TRANSITIONS, Event, IllegalTransition, Mode, ModeTracker, next_mode
from tbox.model import NS_PER_MS, Draft, Now, PackSnapshot
from tests.tables import check_pair, check_whole, every_pair


def snapshot(t_ms: int, **scalars: float | None) -> PackSnapshot:
    none_v = np.zeros(0)
    none_ok = np.zeros(0, dtype=bool)
    known = {role: value for role, value in scalars.items() if value is not None}
    return PackSnapshot(
        t_ms * NS_PER_MS, none_v, none_ok, none_v, none_ok, np.zeros(0, dtype=np.int32), known
    )


class Drive:
    """Feeds a tracker ten snapshots a second."""

    def __init__(self) -> None:
        self.tracker = ModeTracker()
        self.t_ms = 0
        self.drafts: list[Draft] = []

    def hold(self, seconds: float, **scalars: float | None) -> Mode:
        for _ in range(int(seconds * 10)):
            self.t_ms += 100
            _, drafts = self.tracker.step(Now(self.t_ms * NS_PER_MS), snapshot(self.t_ms, **scalars))
            self.drafts += drafts
        return self.tracker.context.mode


@every_pair(Mode, Event)
def test_every_pair_is_either_in_the_table_or_refused(state: Mode, event: Event) -> None:
    check_pair(TRANSITIONS, state, event, next_mode, IllegalTransition)
    assert TRANSITIONS[state].get(event) is not state


def test_every_mode_can_be_reached_and_left() -> None:
    check_whole(TRANSITIONS, Mode, Event)


def test_a_drive_goes_from_idle_through_city_to_highway_and_back() -> None:
    drive = Drive()
    assert drive.hold(5, speed=0) is Mode.IDLE
    assert drive.hold(5, speed=30) is Mode.CITY
    assert drive.hold(15, speed=100) is Mode.HIGHWAY
    assert drive.hold(60, speed=75) is Mode.HIGHWAY, "between 60 and 90 the mode stays"
    assert drive.hold(15, speed=50) is Mode.CITY
    assert drive.hold(60, speed=75) is Mode.CITY
    assert drive.hold(200, speed=0) is Mode.IDLE
    changes = [(d.body["from"], d.body["to"]) for d in drive.drafts]
    assert changes == [("idle", "city"), ("city", "highway"), ("highway", "city"), ("city", "idle")]


def test_a_red_light_does_not_end_the_journey_but_switching_off_does() -> None:
    drive = Drive()
    drive.hold(5, speed=30, ignition=2)
    assert drive.hold(100, speed=0, ignition=2) is Mode.CITY
    assert drive.tracker.context.journey_id == 1
    assert drive.hold(15, speed=0, ignition=0) is Mode.IDLE
    assert drive.tracker.context.journey_id == 0
    drive.hold(5, speed=30, ignition=2)
    assert drive.tracker.context.journey_id == 2


def test_one_spike_of_speed_moves_nothing() -> None:
    drive = Drive()
    for _ in range(20):
        drive.hold(0.5, speed=120)
        drive.hold(0.5, speed=0)
    assert drive.tracker.context.mode is Mode.IDLE


@pytest.mark.parametrize(("state", "mode"), [(2, Mode.CHARGING_AC), (3, Mode.CHARGING_DC)])
def test_charging_is_told_from_the_charging_state(state: float, mode: Mode) -> None:
    drive = Drive()
    drive.hold(5, speed=30)
    assert drive.hold(5, speed=0, charging_state=state, charging_power=3) is mode
    assert drive.tracker.context.charging_power_kw == 3
    assert drive.hold(10, speed=0, charging_state=1) is Mode.IDLE


def test_without_a_charging_state_the_power_tells_and_a_tapering_dc_charge_stays_dc() -> None:
    drive = Drive()
    assert drive.hold(5, speed=0, charging_power=120) is Mode.CHARGING_DC
    assert drive.hold(60, speed=0, charging_power=5) is Mode.CHARGING_DC
    assert drive.hold(60, speed=0, charging_power=0.1) is Mode.IDLE
    assert drive.hold(5, speed=0, charging_power=11) is Mode.CHARGING_AC


def test_a_rolling_car_is_not_charging_whatever_the_charger_says() -> None:
    drive = Drive()
    assert drive.hold(20, speed=50, charging_state=3) is Mode.CITY


def test_a_silent_bus_ends_the_journey_in_time() -> None:
    drive = Drive()
    drive.hold(5, speed=30)
    assert drive.hold(120) is Mode.CITY
    assert drive.hold(120) is Mode.IDLE


scalars = st.fixed_dictionaries(
    {
        "speed": st.none() | st.floats(-10, 300) | st.just(float("nan")),
        "charging_state": st.none() | st.sampled_from([0.0, 1.0, 2.0, 3.0, 7.0]),
        "charging_power": st.none() | st.floats(-50, 400),
        "ignition": st.none() | st.sampled_from([0.0, 1.0, 2.0, 3.0]),
    }
)


@given(st.lists(st.tuples(st.floats(0.1, 300), scalars), max_size=30))
def test_no_input_raises_and_a_journey_id_is_there_exactly_while_driving(
    story: list[tuple[float, dict[str, float | None]]],
) -> None:
    tracker, t_ms, seen = ModeTracker(), 0, 0
    for seconds, known in story:
        for part in range(2):
            t_ms += int(seconds * 1000) * part + 1
            context, _ = tracker.step(Now(t_ms * NS_PER_MS), snapshot(t_ms, **known))
            assert context.mode.is_driving == (context.journey_id > 0)
            assert context.journey_id == 0 or context.journey_id >= seen
            seen = max(seen, context.journey_id)
