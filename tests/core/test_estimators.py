"""Tests of the estimators against simulated cells: a WLTC with wrong beginnings, ageing packs, divergence."""

from __future__ import annotations

import csv
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.estimators import OCV_V, Estimators, EstimatorSettings
from tbox.edge.mode import Context
from tbox.model import NS_PER_S, Draft, Now, PackSnapshot
from tbox.sim.cell import CHEMISTRIES, Cells
from tests.data import data_file

CELLS = 8  # of 192 in series: the mean is what counts
SERIES = 192


class Bench:
    """Simulated cells whose current is measured with a gain error and whose voltages carry noise."""

    def __init__(
        self, chemistry: str = "NMC", soc: float = 78.0, soh: float = 100.0, gain: float = 1.0, **limits: Any
    ) -> None:
        kind = CHEMISTRIES[chemistry]
        ones = np.ones(CELLS)
        self.cells = Cells(
            kind,
            ones * soc / 100,
            ones * kind.capacity_ah * soh / 100,
            ones * kind.r0_ohm,
            ones * kind.r1_ohm,
        )
        self.capacity_ah = kind.capacity_ah
        self.rng = np.random.default_rng(7)
        self.gain = gain
        self.estimators = Estimators(EstimatorSettings(chemistry=chemistry.lower(), **limits))  # type: ignore[arg-type]
        self.s = 0.0
        self.drafts: list[Draft] = []

    @property
    def soc(self) -> float:
        return float(self.cells.soc.mean()) * 100

    def step(self, current_a: float, dt_s: float = 1.0, **bms: float) -> None:
        volts, _ = self.cells.step(np.full(CELLS, current_a), np.full(CELLS, 25.0), dt_s)
        self.s += dt_s
        measured = volts + self.rng.normal(0, 0.001, CELLS)
        snapshot = PackSnapshot(
            int(self.s * NS_PER_S), measured, np.ones(CELLS, dtype=bool),
            np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int32),
            {"pack_current": current_a * self.gain + self.rng.normal(0, 0.05), **bms},
        )  # fmt: skip
        self.drafts += self.estimators.step(Now(snapshot.mono_ns), snapshot, Context())

    def hold(self, seconds: float, current_a: float, dt_s: float = 1.0, **bms: float) -> None:
        for _ in range(int(seconds / dt_s)):
            self.step(current_a, dt_s, **bms)

    def error(self) -> float:
        percent = self.estimators.status()["soc_percent"]
        assert isinstance(percent, float)
        return percent - self.soc


def wltc_mps() -> list[float]:
    with data_file("cycles", "wltc_3b.csv").open(encoding="utf-8-sig") as file:
        return [float(row["cycMps"]) for row in csv.DictReader(file)]


def pack_power_w(before: float, after: float) -> float:
    """A 1.9 t car's road load in W out of the battery: 90 % reach the wheel, 65 % come back, 400 W aside."""
    speed = (before + after) / 2
    force = 1900 * (after - before) + 0.5 * 1.2 * 0.65 * speed**2 + (1900 * 9.81 * 0.009 if speed else 0)
    wheel = force * speed
    return 400 + (wheel / 0.9 if wheel > 0 else wheel * 0.65)


def drive(bench: Bench, speeds: list[float], told_soc: float) -> list[float]:
    """Drive a cycle with a BMS that believes `told_soc` at first; return the error at every second."""
    errors = []
    for before, after in pairwise(speeds):
        volts = float(bench.cells.ocv_v.mean()) * SERIES
        bench.step(-pack_power_w(before, after) / volts, soc=told_soc)
        errors.append(bench.error())
    return errors


@pytest.mark.parametrize("initial_error", [10.0, -10.0])
@pytest.mark.parametrize("gain", [1.01, 0.99])
def test_soc_is_within_three_points_over_a_wltc(initial_error: float, gain: float) -> None:
    bench = Bench(gain=gain)
    errors = drive(bench, wltc_mps(), 78.0 + initial_error)
    assert max(abs(error) for error in errors) < 3.0, "the rest before the start has corrected it"


def test_a_cycle_joined_on_the_move_is_right_after_its_first_stops() -> None:
    bench = Bench(gain=1.01)
    speeds = wltc_mps()
    moving = next(i for i, speed in enumerate(speeds) if speed > 10)
    errors = drive(bench, speeds[moving:], 68.0)
    assert abs(errors[0]) > 9
    assert max(abs(error) for error in errors[600:]) < 3.0


@pytest.mark.parametrize("off_v", [0.005, -0.005])
def test_a_curve_that_is_five_millivolts_off_still_does(off_v: float) -> None:
    curve = tuple((float(percent), volts + off_v) for percent, volts in OCV_V["nmc"])
    bench = Bench(gain=0.99, ocv_percent_v=curve)
    assert max(abs(error) for error in drive(bench, wltc_mps(), 88.0)[60:]) < 3.0


def test_on_the_lfp_plateau_a_voltage_tells_little_and_the_sigma_says_so() -> None:
    bench = Bench("LFP", soc=65.0)
    bench.hold(600, 0.0, soc=75.0)
    assert abs(bench.error()) < 3 * bench.estimators.status()["soc_sigma"]
    assert bench.estimators.status()["soc_sigma"] > 2
    low = Bench("LFP", soc=8.0)
    low.hold(600, 0.0, soc=18.0)
    assert abs(low.error()) < 1.0, "at the foot of the curve it tells a lot"


@pytest.mark.parametrize("soc", [30.0, 65.0, 85.0, 93.0])
@pytest.mark.parametrize("seconds", [5, 15, 60, 600])
def test_a_look_at_the_flat_curve_never_spoils_what_was_known(soc: float, seconds: int) -> None:
    """Beside a knee the volts that fit lie mostly on the plateau: their middle is no measurement."""
    for off in (0.0, -8.0):
        bench = Bench("LFP", soc=soc)
        bench.hold(seconds, 0.0, soc=soc + off)
        assert abs(bench.error()) < abs(off) + 0.5, off


def test_a_long_charge_under_load_is_counted_and_trusted_less() -> None:
    bench = Bench(soc=20.0)
    bench.hold(600, 0.0, soc=20.0)
    rested = bench.estimators.status()["soc_sigma"]
    bench.hold(3600, 55.0)
    assert bench.soc == pytest.approx(70, abs=0.1) and abs(bench.error()) < 1.0
    assert bench.estimators.status()["soc_sigma"] > rested


@pytest.mark.parametrize("gain", [1.0, 1.01, 0.99])
@pytest.mark.parametrize("soh", [100.0, 91.0, 80.0, 70.0])
def test_soh_is_within_three_points_on_aged_packs(soh: float, gain: float) -> None:
    bench = Bench(soc=85.0, soh=soh, gain=gain)
    bench.hold(900, 0.0, 3.0, soc=85.0)
    for _ in range(3):
        while bench.soc > 25:
            bench.step(-40.0, 3.0)
        bench.hold(900, -0.5, 3.0)
        while bench.soc < 85:
            bench.step(60.0, 3.0)
        bench.hold(900, -0.5, 3.0)
    assert bench.estimators.status()["soh_percent"] == pytest.approx(soh, abs=3.0)
    assert abs(bench.error()) < 3.0


@pytest.mark.slow
def test_soh_follows_a_pack_that_ages_over_its_life() -> None:
    bench = Bench(soc=85.0)
    bench.hold(900, 0.0, 5.0, soc=85.0)
    for soh in np.linspace(100, 75, 51):
        bench.cells.capacity_ah[:] = bench.capacity_ah * soh / 100
        while bench.soc > 35:
            bench.step(-50.0, 5.0)
        bench.hold(900, 0.0, 5.0)
        while bench.soc < 85:
            bench.step(50.0, 5.0)
        bench.hold(900, 0.0, 5.0)
        assert bench.estimators.status()["soh_percent"] == pytest.approx(soh, abs=3.0)


def test_small_swings_are_no_measure_of_capacity() -> None:
    bench = Bench(soc=80.0)
    bench.hold(600, 0.0, soc=80.0)
    for current in (-40.0, 40.0) * 3:
        bench.hold(600, current, 2.0)
        bench.hold(400, 0.0, 2.0)
    assert bench.estimators.status()["soh_percent"] is None


def events(bench: Bench) -> list[str]:
    return [draft.body["event"] for draft in bench.drafts]


def test_a_bms_that_is_off_is_told_once_and_so_is_its_return() -> None:
    bench = Bench(soc=60.0)
    bench.hold(300, 0.0, soc=60.0)
    assert events(bench) == []
    bench.hold(300, 0.0, soc=75.0)
    assert events(bench) == ["soc_divergence"]
    assert bench.drafts[0].body["own_percent"] == pytest.approx(60, abs=2)
    bench.hold(300, 0.0, soc=61.0)
    assert events(bench) == ["soc_divergence", "soc_agreement"]


def test_a_bms_that_overrates_its_health_is_told() -> None:
    bench = Bench(soc=85.0, soh=75.0)
    bench.hold(900, 0.0, 3.0, soc=85.0, soh=98.0)
    while bench.soc > 25:
        bench.step(-40.0, 3.0)
    bench.hold(900, 0.0, 3.0, soh=98.0)
    assert "soh_divergence" in events(bench)


def test_a_hole_in_the_current_makes_the_estimate_humbler() -> None:
    bench = Bench(soc=60.0)
    bench.hold(600, 0.0, soc=60.0)
    bench.hold(60, -80.0)
    before = bench.estimators.status()["soc_sigma"]
    bench.step(-80.0, 3600.0)
    assert bench.estimators.status()["soc_sigma"] > before + 1


def test_a_curve_that_does_not_rise_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="both rising"):
        msgspec.convert({"ocv_percent_v": [[0, 3.0], [50, 2.9]]}, EstimatorSettings)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0.001, 1e5),
            st.none() | st.floats(-2000, 2000),
            st.floats(0, 6),
            st.none() | st.floats(0, 100),
        ),
        max_size=50,
    )
)
def test_whatever_comes_the_estimates_stay_in_their_range(
    steps: list[tuple[float, float | None, float, float | None]],
) -> None:
    estimators, t_ns = Estimators(), 0
    for wait_s, current, volts, soc in steps:
        t_ns += int(wait_s * NS_PER_S)
        known = {"pack_current": current, "soc": soc, "soh": soc}
        snapshot = PackSnapshot(
            t_ns, np.full(3, volts), np.ones(3, dtype=bool), np.zeros(0), np.zeros(0, dtype=bool),
            np.zeros(0, dtype=np.int32), {role: value for role, value in known.items() if value is not None},
        )  # fmt: skip
        estimators.step(Now(t_ns), snapshot, Context())
        status = estimators.status()
        assert status["soc_percent"] is None or 0 <= status["soc_percent"] <= 100
        assert status["soh_percent"] is None or 30 <= status["soh_percent"] <= 120
