"""Temperatures: the slope against a fitted line, sensors that lie, the runaway condition to the letter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.readings import Items, Scalar
from tbox.edge.thermal import Runaway, Thermal
from tests.core.edge_fixture import Floats

S = 1_000_000_000
NAMES = [f"probe {i}" for i in range(8)]
ALL = np.ones(8, dtype=np.bool_)
PARAMS = {"voltage_drop": 25.0, "temperature": 60.0, "sustained": 3.0}


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-5, 5), st.lists(st.floats(-0.5, 0.5), min_size=8, max_size=8), st.integers(200, 900),
    st.integers(0, 10**6),
)  # fmt: skip
def test_the_slope_is_that_of_a_line_fitted_to_the_window(
    slope: float, apart: list[float], period_ms: int, seed: int
) -> None:
    slopes = slope + np.array(apart)  # not so far apart that a probe is held to be open within the 18 s
    thermal, rows = Thermal(NAMES), []
    wobble = 0.1 * np.random.default_rng(seed).standard_normal((20, 8))
    for n in range(20):
        t_s = n * period_ms / 1000
        rows.append((t_s, 25.0 + slopes * t_s + wobble[n]))
        thermal.step(round(t_s * S), rows[-1][1], ALL)
    window = [row for row in rows if rows[-1][0] - row[0] <= 2.0 + period_ms / 1000]
    window = [row for row in window if rows[-1][0] - row[0] < 2.0 + period_ms / 1000][-20:]
    fits = [
        np.polyfit([t for t, _ in tail], np.stack([c for _, c in tail]), 1)[0]
        for tail in (window, window[1:])
        if len(tail) >= 3
    ]
    assert thermal.rise is not None
    assert any(np.allclose(thermal.rise, fit, atol=1e-6) for fit in fits)


def test_an_unknown_probe_has_no_slope_and_spoils_no_other() -> None:
    thermal = Thermal(NAMES)
    for n in range(15):
        known = ALL.copy()
        known[3] = n != 10
        readings = thermal.step(n * S // 5, np.full(8, 25.0 + n * 0.2), known)
    rise = readings["probe_rise"]
    assert isinstance(rise, Items)
    assert np.isnan(rise.values[3]) and np.allclose(np.delete(rise.values, 3), 1.0)
    assert rise.highest == pytest.approx(1.0)


def test_a_gap_begins_the_slope_anew() -> None:
    thermal = Thermal(NAMES)
    for n in range(15):
        thermal.step(n * S // 5, np.full(8, 25.0), ALL)
    thermal.step(100 * S, np.full(8, 60.0), ALL)
    assert thermal.rise is None


def test_one_step_of_a_coarse_sensor_is_no_runaway_slope() -> None:
    thermal, worst = Thermal(NAMES), 0.0
    for n in range(60):
        thermal.step(n * S // 5, np.full(8, 25.0 if n < 30 else 26.0), ALL)
        if thermal.rise is not None:
            worst = max(worst, float(thermal.rise.max()))
    assert 0.3 < worst < 0.8


def test_a_probe_that_stands_still_while_the_others_move_is_counted() -> None:
    rng = np.random.default_rng(3)
    thermal = Thermal(NAMES)
    for n in range(50):
        degrees = np.round(25 + 0.1 * rng.standard_normal(8), 1)
        degrees[5] = 25.0
        readings = thermal.step(n * S // 5, degrees, ALL)
    still = readings["probe_still"]
    assert isinstance(still, Items)
    assert still.high == 5 and still.highest >= 40
    assert np.delete(still.values, 5).max() < 12


def test_probes_that_all_stand_still_are_not_stuck() -> None:
    thermal = Thermal(NAMES)
    for n in range(50):
        readings = thermal.step(n * S // 5, np.full(8, 25.0), ALL)
    still = readings["probe_still"]
    assert isinstance(still, Items) and still.highest <= 1


def test_a_coarse_probe_that_does_not_follow_the_median_lags() -> None:
    thermal = Thermal(NAMES)
    for n in range(50):
        degrees = np.full(8, np.floor(25.0 + n * 0.3))
        degrees[2] = 25.0
        readings = thermal.step(n * S // 5, degrees, ALL)
    lag = readings["probe_lag"]
    assert isinstance(lag, Items) and lag.high == 2 and lag.highest == pytest.approx(14.0)


def spread_k(degrees: list[float]) -> float | None:
    reading = Thermal(NAMES).step(0, np.array(degrees), ALL)["temperature_spread"]
    assert isinstance(reading, Scalar)
    return reading.value


def test_an_open_probe_is_told_as_open_and_left_out_of_the_spread() -> None:
    degrees = [25.0, 26.0, -40.0, 25.0, 25.0, 27.0, 25.0, 25.0]
    assert spread_k(degrees) == pytest.approx(2.0)
    cold = Thermal(NAMES).step(0, np.array(degrees), ALL)["probe_cold"]
    assert isinstance(cold, Items) and cold.high == 2 and cold.highest == pytest.approx(65.0)


def test_a_pack_that_is_cold_on_one_side_has_its_whole_spread() -> None:
    assert spread_k([25.0, 25.0, 0.0, 0.0, 0.0, 25.0, 25.0, 25.0]) == pytest.approx(25.0)
    assert spread_k([25.0, 25.0, 5.5, 25.0, 25.0, 25.0, 25.0, 25.0]) == pytest.approx(19.5)


def test_a_wire_that_makes_contact_again_is_no_rise() -> None:
    thermal, highest = Thermal(NAMES), 0.0
    for n in range(60):
        degrees = np.full(8, 25.0)
        if 20 <= n < 40:
            degrees[6] = -40.0
        thermal.step(n * S // 5, degrees, ALL)
        if thermal.rise is not None:
            highest = max(highest, float(np.nanmax(thermal.rise)))
    assert highest < 0.01


# --- runaway ------------------------------------------------------------------------------------------


def runaway(degrees: Floats, volts: Floats, period_s: float = 0.2) -> float:
    """Return the highest value of the runaway watch over a run: (n, 8) degC, (n, 4) V."""
    thermal, watch = Thermal(NAMES), Runaway(PARAMS, [f"cell {i}" for i in range(4)], NAMES)
    highest = 0.0
    for n in range(len(degrees)):
        t_ns = round(n * period_s * S)
        watch.see_cells(t_ns, volts[n])
        thermal.step(t_ns, degrees[n], ALL)
        reading = watch.see_probes(t_ns, degrees[n], thermal.rise)
        assert isinstance(reading, Scalar)
        highest = max(highest, reading.value or 0.0)
    return highest


def heating(rate: float, seconds: float = 20.0, start_c: float = 25.0) -> Floats:
    degrees = np.full((int(seconds / 0.2), 8), start_c)
    degrees[:, 4] += rate * 0.2 * np.arange(len(degrees))
    return degrees


HEALTHY = np.full((100, 4), 3.7)
FALLEN = np.vstack([np.full((20, 4), 3.7), np.tile([3.7, 2.7, 3.7, 3.7], (80, 1))])


def test_the_slope_alone_never_counts() -> None:
    assert runaway(heating(1.7), HEALTHY) == 0.0


def test_a_collapsed_cell_alone_never_counts() -> None:
    assert runaway(heating(0.0), FALLEN) < 1e-9


def test_a_hot_probe_alone_never_counts() -> None:
    assert runaway(heating(0.0, start_c=70.0), HEALTHY) < 1e-9


def test_slope_with_a_collapsed_cell_counts() -> None:
    assert runaway(heating(1.7), FALLEN) == pytest.approx(1.7, rel=0.01)


def test_slope_with_a_hot_probe_counts() -> None:
    assert runaway(heating(1.2, start_c=50.0), HEALTHY) == pytest.approx(1.2, rel=0.01)


def test_a_drop_of_less_than_a_quarter_is_no_collapse() -> None:
    less = np.where(FALLEN < 3.0, 3.7 * 0.76, FALLEN)
    more = np.where(FALLEN < 3.0, 3.7 * 0.74, FALLEN)
    assert runaway(heating(1.7), less) == 0.0
    assert runaway(heating(1.7), more) > 1.0


def test_a_slope_that_does_not_last_does_not_count() -> None:
    degrees = heating(0.0)
    degrees[40:50, 4] += 2.0 * 0.2 * np.arange(10)  # two seconds of it
    degrees[50:, 4] += 4.0
    assert runaway(degrees, FALLEN) < 1.0


def test_a_cell_that_collapsed_and_fell_silent_still_counts() -> None:
    silent = np.where(np.arange(100)[:, None] > 25, np.where(FALLEN < 3.0, np.nan, FALLEN), FALLEN)
    assert runaway(heating(1.7), silent) == pytest.approx(1.7, rel=0.01)


def test_unknown_probes_make_the_condition_unknown_not_false_alarms() -> None:
    watch = Runaway(PARAMS, ["cell 0"], NAMES)
    assert watch.see_probes(0, np.full(8, np.nan), None).value is None
