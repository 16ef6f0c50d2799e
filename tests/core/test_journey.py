"""Tests of journeys and charge sessions: sums against arithmetic, reasons, what is told of odd charges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.journey import Journeys
from tbox.edge.mode import ModeTracker
from tbox.model import NS_PER_MS, Draft, Level, Now, PackSnapshot


class Car:
    """A mode tracker and journeys fed together, ten snapshots a second."""

    def __init__(self) -> None:
        self.tracker, self.journeys = ModeTracker(), Journeys()
        self.ms = 0
        self.drafts: list[Draft] = []

    def step(self, ms: int, **scalars: float) -> None:
        self.ms += ms
        now = Now(self.ms * NS_PER_MS)
        snapshot = PackSnapshot(
            now.mono_ns,
            np.array([3.6, 3.7, 3.9]), np.array([True, True, False]),
            np.array([20.0, 31.0, 99.0]), np.array([True, True, False]), np.zeros(3, dtype=np.int32),
            scalars,
        )  # fmt: skip
        context, drafts = self.tracker.step(now, snapshot)
        self.drafts += drafts + self.journeys.step(now, snapshot, context)

    def hold(self, seconds: float, **scalars: float) -> None:
        for _ in range(int(seconds * 10)):
            self.step(100, **scalars)

    def bodies(self, **wanted: str) -> list[dict[str, Any]]:
        return [d.body for d in self.drafts if all(d.body.get(k) == v for k, v in wanted.items())]


def test_a_journey_tells_distance_energy_soc_and_range() -> None:
    car = Car()
    car.hold(5, speed=0, soc=80, range=300, odometer=1000)
    for i in range(36_000):  # an hour at 36 km/h and 7.2 kW out
        car.step(100, speed=36, pack_voltage=360, pack_current=-20, soc=80 - i * 10 / 36_000,
                 range=300 - i * 40 / 36_000, odometer=1000 + i / 1000, ambient_temperature=12)  # fmt: skip
    car.hold(200, speed=0, pack_voltage=360, pack_current=0, soc=70, range=260, odometer=1036)
    (start,), (end,) = car.bodies(record="journey", event="start"), car.bodies(record="journey", event="end")
    assert start["journey"] == end["journey"] == 1 and end["reason"] == "parked"
    assert end["distance_km"] == pytest.approx(36, rel=0.001)
    assert end["energy_kwh"] == pytest.approx(7.2, rel=0.001)
    assert end["kwh_per_km"] == pytest.approx(0.2, rel=0.002)
    assert end["soc_used_points"] == pytest.approx(10, abs=0.02)
    assert end["range_used_km"] == pytest.approx(40, abs=0.2)
    assert (end["battery_min_c"], end["battery_max_c"]) == (20.0, 31.0), "an invalid probe does not count"
    assert (end["cell_min_v"], end["cell_max_v"]) == (3.6, 3.7)
    assert end["ambient_mean_c"] == 12 and end["speed_max_kmh"] == 36
    assert 11 <= len(car.bodies(record="journey", event="update")) <= 13


def test_what_is_regenerated_is_told_and_subtracted() -> None:
    car = Car()
    car.hold(2, speed=50, pack_voltage=400, pack_current=0)
    car.hold(360, speed=50, pack_voltage=400, pack_current=-100)
    car.hold(180, speed=50, pack_voltage=400, pack_current=50)
    car.drafts += car.journeys.flush(Now(car.ms * NS_PER_MS))
    (end,) = car.bodies(record="journey", event="end")
    assert end["reason"] == "stop"
    assert end["regenerated_kwh"] == pytest.approx(1.0, abs=0.01)
    assert end["energy_kwh"] == pytest.approx(3.0, abs=0.02)


def test_a_hole_in_the_values_is_told_not_bridged() -> None:
    car = Car()
    car.hold(60, speed=36)
    car.step(120_000, speed=36)
    car.hold(60, speed=36)
    car.drafts += car.journeys.flush(Now(car.ms * NS_PER_MS))
    (end,) = car.bodies(record="journey", event="end")
    assert end["distance_km"] == pytest.approx(1.2, abs=0.02) and end["gap_s"] == pytest.approx(120)


CHARGE = {"speed": 0.0, "charging_state": 3.0, "pack_voltage": 400.0, "pack_current": 250.0}


def charged(**last: float) -> dict[str, Any]:
    car = Car()
    for i in range(6000):
        car.step(100, **CHARGE, soc=20 + i / 100, charging_power=105 if i < 3000 else 100)
    car.hold(400, **({"speed": 0.0, "soc": 80.0, "charging_power": 0.0} | last))
    (start,), (end,) = car.bodies(record="charge", event="start"), car.bodies(record="charge", event="end")
    assert start["session"] == end["session"] == 1 and end["modes"] == ["charging_dc"]
    return end


def test_a_charge_session_tells_energy_peak_and_soc() -> None:
    end = charged(charging_state=0)
    assert end["battery_kwh"] == pytest.approx(100 * 600 / 3600, rel=0.01)
    assert end["charger_kwh"] == pytest.approx(102.5 * 600 / 3600, rel=0.01)
    assert end["peak_kw"] == 105 and end["soc_gained_points"] == pytest.approx(60, abs=0.5)
    assert end["duration_s"] == pytest.approx(598, abs=2), (
        "it ends when the current ends, not when it is sure"
    )


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"charging_state": 0.0}, "unplugged"),
        ({"charging_state": 1.0}, "stopped_plugged"),
        ({"charging_state": 1.0, "soc": 99.5}, "complete"),
        ({"charging_state": 1.0, "contactor_state": 0.0}, "contactors_open"),
        ({"speed": 20.0, "charging_state": 0.0}, "driven_off"),
    ],
)
def test_a_charge_says_why_it_stopped(last: dict[str, float], reason: str) -> None:
    assert charged(**last)["reason"] == reason


def test_a_bus_that_falls_silent_ends_the_charge_and_says_so() -> None:
    car = Car()
    car.hold(60, **CHARGE, charging_power=100)
    for _ in range(3000):
        car.step(100)
    (end,) = car.bodies(record="charge", event="end")
    assert end["reason"] == "bus_silent"


def test_plugged_but_not_charging_is_told_once() -> None:
    car = Car()
    car.hold(1000, speed=0, soc=50, charging_state=1)
    (event,) = car.bodies(event="plugged_not_charging")
    assert event["soc_percent"] == 50 and 300 <= event["for_s"] < 302
    car.hold(10, speed=0, soc=50, charging_state=0)
    car.hold(400, speed=0, soc=50, charging_state=2, charging_power=0.0)
    assert len(car.bodies(event="plugged_not_charging")) == 2, "a charger that gives nothing is no charge"


def test_a_finished_charge_left_plugged_is_no_event() -> None:
    car = Car()
    car.hold(60, **CHARGE, charging_power=100, soc=80)
    car.hold(1000, speed=0, soc=80, charging_state=1)
    assert car.bodies(event="plugged_not_charging") == []


def test_soc_lost_while_parked_is_an_event_and_driving_it_away_is_none() -> None:
    car = Car()
    car.hold(60, speed=0, soc=80)
    car.hold(60, speed=0, soc=78.5)
    assert car.bodies(event="soc_drop") == []
    car.hold(60, speed=0, soc=76.5)
    (event,) = car.bodies(event="soc_drop")
    assert (event["from_percent"], event["to_percent"]) == (80, 76.5)
    car.hold(60, speed=50, soc=76.5)
    car.hold(60, speed=50, soc=60)
    car.hold(300, speed=0, soc=60)
    assert len(car.bodies(event="soc_drop")) == 1
    assert all(d.level is Level.WARNING for d in car.drafts if d.body.get("event") == "soc_drop")


def test_soc_falling_during_a_charge_is_an_event() -> None:
    car = Car()
    car.hold(60, **CHARGE, soc=50)
    car.hold(60, **CHARGE, soc=46)
    assert len(car.bodies(event="soc_drop")) == 1


story = st.lists(
    st.tuples(
        st.integers(1, 400_000),
        st.dictionaries(
            st.sampled_from(["speed", "soc", "pack_voltage", "pack_current", "charging_power", "range"]),
            st.floats(-1e6, 1e6),
        ),
        st.sampled_from([None, 0.0, 1.0, 2.0, 3.0, 9.0]),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(story)
def test_starts_and_ends_pair_up_whatever_comes(
    steps: list[tuple[int, dict[str, float], float | None]],
) -> None:
    car = Car()
    for ms, scalars, state in steps:
        for part in (1, ms):
            car.step(part, **scalars, **({} if state is None else {"charging_state": state}))
    car.drafts += car.journeys.flush(Now(car.ms * NS_PER_MS))
    for record, number in (("journey", "journey"), ("charge", "session")):
        begun = [body[number] for body in car.bodies(record=record, event="start")]
        ended = [body[number] for body in car.bodies(record=record, event="end")]
        assert begun == ended == sorted(set(begun))
