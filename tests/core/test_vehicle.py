"""The vehicle follows its cycle as far as power allows, and its energy is that of a car."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbox.sim.vehicle import (
    CHARGING_AC,
    CHARGING_DC,
    CYCLES,
    PLUGGED_IDLE,
    UNPLUGGED,
    CycleError,
    Vehicle,
    load_cycle,
)
from tests.data import data_file

DT_S = 0.1


def vehicle(cycle: str = "demo") -> Vehicle:
    return Vehicle(load_cycle(cycle), ambient_c=21.0, odometer_km=0.0)


def drive(car: Vehicle, begin_s: float, seconds: float, *, share: float = 1.0, closed: bool = True) -> float:
    """Drive and return the energy taken from the pack, J."""
    taken_j = 0.0
    for step in range(1, round(seconds / DT_S) + 1):
        power_w = car.step(
            begin_s + step * DT_S, DT_S, drive_share=share, closed=closed, charge_share=1.0, dcdc=True
        )
        taken_j -= power_w * DT_S
    return taken_j


@pytest.mark.parametrize("name", ["demo", "city", "highway", "mixed"])
def test_with_power_the_speed_is_the_cycles(name: str) -> None:
    car = vehicle(name)
    for second in range(int(car.cycle.seconds)):
        drive(car, second, 1.0)
        assert car.speed_mps == pytest.approx(car.cycle.at(second + 1.0).speed_mps, abs=0.3)


@pytest.mark.parametrize(("name", "low", "high"), [("city", 90, 230), ("highway", 140, 280)])
def test_consumption_per_kilometre_is_a_cars(name: str, low: float, high: float) -> None:
    car = vehicle(name)
    taken_j = drive(car, 0.0, car.cycle.seconds)
    assert low < taken_j / 3600 / (car.distance_m / 1000) < high


def test_braking_gives_energy_back_but_less_than_it_took() -> None:
    car = vehicle("city")
    speeding_j = drive(car, 0.0, 31.0)
    assert min(drive(car, 31.0 + k, 1.0) for k in range(6)) < 0 < speeding_j


def test_without_power_it_rolls_to_a_stop_and_takes_nothing() -> None:
    car = vehicle("highway")
    drive(car, 0.0, 40.0)
    assert car.speed_mps > 20
    assert drive(car, 40.0, 30.0, share=0.0, closed=False) == 0.0
    assert car.standing
    drive(car, 70.0, 15.0)
    assert car.speed_mps > 20


def test_less_power_means_less_acceleration() -> None:
    full, half = vehicle("highway"), vehicle("highway")
    drive(full, 0.0, 18.0)
    drive(half, 0.0, 18.0, share=0.15)
    assert 5 < half.speed_mps < full.speed_mps - 2


def test_distance_is_the_integral_of_speed_and_the_motor_turns_with_the_wheels() -> None:
    car, summed_m = vehicle("highway"), 0.0
    for step in range(1, 600):
        before = car.speed_mps
        drive(car, (step - 1) * DT_S, DT_S)
        summed_m += (before + car.speed_mps) / 2 * DT_S
    assert car.distance_m == pytest.approx(summed_m)
    assert car.motor_rpm == pytest.approx(car.speed_mps / 0.34 * 9.3 * 9.5493, rel=1e-4)


def test_charging_feeds_the_pack_and_fades_with_what_the_cells_take() -> None:
    car = vehicle("charge-dc")
    assert drive(car, 20.0, 10.0) == pytest.approx(-(120_000 - 900) * 10.0)
    power_w = car.step(40.0, DT_S, drive_share=1.0, closed=True, charge_share=0.25, dcdc=True)
    assert power_w == pytest.approx(30_000 - 900)


def test_the_12_volt_supply_lives_from_the_converter() -> None:
    car = vehicle("ready")
    drive(car, 0.0, 5.0)
    assert car.low_v > 13.5
    for step in range(3000):
        car.step(5 + step * DT_S, DT_S, drive_share=1.0, closed=True, charge_share=1.0, dcdc=False)
    assert 8.0 <= car.low_v < 9.0


def test_a_cycle_once_stays_at_its_end_and_a_loop_starts_anew() -> None:
    once, again = load_cycle("demo"), load_cycle("demo", loop=True)
    assert once.at(once.seconds + 40).speed_mps == 0.0
    assert again.at(again.seconds + 40) == again.at(40.0)


def test_a_csv_cycle_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    for bom in ("", "\ufeff"):
        path = tmp_path / "own.csv"
        path.write_text(bom + "cycSecs,cycMps,cycGrade\n0,0,0\n1,2.5,0\n3,10,0\n", encoding="utf-8")
        cycle = load_cycle(str(path))
        assert [cycle.at(t).speed_mps for t in (0.5, 1.0, 2.0, 9.0)] == pytest.approx([1.25, 2.5, 6.25, 10.0])


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("cycSecs,cycMps\n0,0\n1,fast\n", ":3"),
        ("cycSecs,cycMps\n0,0\n0,1\n", ":3"),
        ("cycSecs,cycMps\n0,0\n1,-1\n", ":3"),
        ("cycSecs,cycMps\n0,0\n1,nan\n", ":3"),
        ("seconds,speed\n0,0\n", ":2"),
        ("cycSecs,cycMps\n", "own.csv"),
    ],
)
def test_a_csv_that_is_no_cycle_is_refused_naming_the_line(tmp_path: Path, text: str, where: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(text)
    with pytest.raises(CycleError) as error:
        load_cycle(str(path))
    assert where in str(error.value)


def test_the_day_is_a_day_of_rest_driving_and_both_kinds_of_charging() -> None:
    day = load_cycle("day")
    assert day.seconds == 86_400
    assert {phase.charging for phase in day.phases} == {UNPLUGGED, PLUGGED_IDLE, CHARGING_AC, CHARGING_DC}
    assert max(phase.speed_kmh for phase in day.phases) > 120


def test_an_unknown_cycle_lists_those_that_exist() -> None:
    with pytest.raises(CycleError) as error:
        load_cycle("moon")
    assert all(name in str(error.value) for name in CYCLES)


@pytest.mark.parametrize(
    ("name", "km"), [("udds", 11.99), ("us06", 12.89), ("hwfet", 16.5), ("wltc_3b", 23.27)]
)
def test_the_standard_cycles_are_driven_over_their_published_distance(name: str, km: float) -> None:
    car = vehicle(str(data_file("cycles", f"{name}.csv")))
    drive(car, 0.0, car.cycle.seconds)
    assert car.distance_m / 1000 == pytest.approx(km, rel=0.01)
