"""Cells against their series: sigma, sudden drops and slow drift, in the healthy case and in the sick one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.imbalance import Imbalance
from tbox.edge.readings import Items, Reading, Scalar
from tests.core.edge_fixture import Floats

S = 1_000_000_000
N = 24
NAMES = [f"cell {i}" for i in range(N)]
ALL = np.ones(N, dtype=np.bool_)


def watch(rows: Floats, period_s: float = 0.1, known: Floats | None = None) -> dict[str, float]:
    """Return the highest value of each watch over a run."""
    imbalance, highest = Imbalance(NAMES), dict[str, float]()
    for n, row in enumerate(rows):
        ok = ALL if known is None else known[n].astype(np.bool_)
        for name, reading in imbalance.step(round(n * period_s * S), row, ok).items():
            highest[name] = float(np.fmax(highest.get(name, np.nan), _value(reading)))
    return highest


def _value(reading: Reading) -> float:
    if isinstance(reading, Scalar):
        return np.nan if reading.value is None else reading.value
    return reading.highest


def noisy(seconds: float, seed: int = 1, period_s: float = 0.1) -> Floats:
    rng = np.random.default_rng(seed)
    offsets = 0.004 * rng.standard_normal(N)
    rows = 3.7 + offsets + 0.001 * rng.standard_normal((int(seconds / period_s), N))
    rounded: Floats = np.round(rows, 3)
    return rounded


@given(st.lists(st.floats(2.5, 4.3), min_size=N, max_size=N), st.sets(st.integers(0, N - 1), max_size=N))
def test_extremes_and_spread_are_those_of_the_known_cells(volts: list[float], unknown: set[int]) -> None:
    known = np.array([i not in unknown for i in range(N)])
    readings = Imbalance(NAMES).step(0, np.array(volts), known)
    cells, spread = readings["cell_voltage"], readings["cell_spread"]
    assert isinstance(cells, Items) and isinstance(spread, Scalar)
    left = [volt for volt, ok in zip(volts, known, strict=True) if ok]
    if not left:
        assert cells.high == -1 and spread.value is None
        return
    assert (cells.highest, cells.lowest) == (max(left), min(left))
    assert spread.value == pytest.approx(max(left) - min(left))


def test_a_healthy_series_shows_next_to_nothing() -> None:
    highest = watch(noisy(120.0))
    assert highest["cell_drop"] < 0.01
    assert highest["cell_drift"] == 0.0
    assert highest["cell_deviation"] < 0.02
    assert highest["cell_still"] < 40


def test_a_common_swing_of_the_load_is_neither_drop_nor_drift() -> None:
    rows = noisy(120.0)
    rows -= 0.3 * (np.sin(np.arange(len(rows)) / 7.0) > 0)[:, None]
    highest = watch(rows)
    assert highest["cell_drop"] < 0.01 and highest["cell_drift"] == 0.0


def test_sigma_is_not_asked_while_the_load_changes() -> None:
    rows = noisy(20.0)
    rows[:, 3] += 0.1
    moving = rows + 0.05 * np.arange(len(rows))[:, None]
    assert watch(rows)["cell_deviation"] > 0.05
    assert np.isnan(watch(moving)["cell_deviation"])


def test_a_sudden_drop_shows_at_once_and_is_not_forgotten_within_a_minute() -> None:
    rows = noisy(90.0)
    rows[300:, 7] -= 0.2
    imbalance = Imbalance(NAMES)
    drops = []
    for n, row in enumerate(rows):
        reading = imbalance.step(n * S // 10, row, ALL)["cell_drop"]
        assert isinstance(reading, Items)
        drops.append((reading.high, reading.highest))
    assert drops[300][0] == 7 and drops[300][1] == pytest.approx(0.2, abs=0.01)
    assert drops[890][1] > 0.1


def test_a_spike_up_and_back_is_no_drop() -> None:
    rows = noisy(60.0)
    rows[300:400, 7] += 0.7
    assert watch(rows)["cell_drop"] < 0.05


def test_a_slow_drift_adds_up_long_before_it_is_an_imbalance() -> None:
    rows = noisy(400.0)
    rows[:, 5] -= 0.0002 * np.maximum(0.0, np.arange(len(rows)) * 0.1 - 60.0)
    highest = watch(rows)
    assert highest["cell_drift"] > 1.8
    assert highest["cell_spread"] < 0.1


@pytest.mark.parametrize("sick", [[5], [5, 17]])
def test_a_sick_cell_does_not_excuse_itself_in_a_short_series(sick: list[int]) -> None:
    rows = noisy(200.0)
    rows[600:, sick] -= 0.05
    assert watch(rows)["cell_drift"] > 1.8


def test_a_series_that_widens_as_a_whole_is_no_drift() -> None:
    rows = noisy(300.0, seed=4)
    wide = np.linspace(1.0, 5.0, len(rows))[:, None]
    assert watch(3.7 + (rows - 3.7) * wide)["cell_drift"] < 1.8


def test_unknown_cells_spoil_no_other() -> None:
    rows, known = noisy(60.0), np.ones((600, N))
    known[200:400, 3] = 0
    rows[200:400, 3] = 65.535
    highest = watch(rows, known=known)
    assert highest["cell_drop"] < 0.01 and highest["cell_drift"] == 0.0 and highest["cell_spread"] < 0.05


def test_a_long_gap_is_no_drop() -> None:
    imbalance = Imbalance(NAMES)
    imbalance.step(0, np.full(N, 3.7), ALL)
    after = np.full(N, 3.7)
    after[2] = 3.4
    reading = imbalance.step(3600 * S, after, ALL)["cell_drop"]
    assert isinstance(reading, Items) and reading.highest == 0.0


def test_two_cells_are_no_series() -> None:
    readings = Imbalance(["cell 0", "cell 1"]).step(0, np.array([3.7, 3.6]), np.ones(2, dtype=np.bool_))
    assert "cell_drop" not in readings
