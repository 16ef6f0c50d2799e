"""Bands: entered at the limit for long enough, held through the hysteresis, left at the clear level."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.bands import Band, Debounce, Ladder
from tbox.model import Level

S = 1_000_000_000
WARN = Band(Level.WARNING, 50.0, 45.0, 2 * S, 1 * S)
CRIT = Band(Level.CRITICAL, 60.0, 55.0, 1 * S, 1 * S)
HIGH = Ladder(1, (WARN, CRIT))
LOW = Ladder(-1, (Band(Level.WARNING, 3.0, 3.2, 0, 0), Band(Level.ALARM, 2.5, 2.8, 0, 0)))


def test_the_highest_band_whose_limit_is_passed_is_reached() -> None:
    assert [HIGH.reached(v) for v in (49.9, 50.0, 59.9, 60.0)] == [-1, 0, 0, 1]
    assert [LOW.reached(v) for v in (3.01, 3.0, 2.51, 2.5)] == [-1, 0, 0, 1]


def test_a_band_is_held_until_its_clear_level() -> None:
    assert [HIGH.held(v, 1) for v in (57.0, 55.0, 46.0, 45.0)] == [1, 0, 0, -1]
    assert [LOW.held(v, 1) for v in (2.7, 2.8, 3.1, 3.2)] == [1, 0, 0, -1]


def test_nothing_is_reached_or_held_by_what_is_not_a_number() -> None:
    assert HIGH.reached(math.nan) == -1
    assert LOW.held(math.nan, 1) == -1


def test_a_limit_counts_after_its_time_without_a_break() -> None:
    debounce = Debounce(HIGH)
    assert [debounce.step(t * S, 0) for t in (0, 1, 2)] == [-1, -1, 0]
    assert debounce.began_ns == 0
    debounce.step(3 * S, -1)
    assert [debounce.step(t * S, 0) for t in (4, 5, 6)] == [-1, -1, 0]


def test_a_higher_band_confirms_the_lower_ones_by_its_own_time() -> None:
    debounce = Debounce(HIGH)
    assert [debounce.step(t * S, 1) for t in (0, 1)] == [-1, 1]


@given(st.lists(st.tuples(st.integers(0, 3 * S), st.floats(40, 70)), max_size=40))
def test_a_confirmed_band_was_passed_through_all_of_its_time(steps: list[tuple[int, float]]) -> None:
    debounce, t_ns, past = Debounce(HIGH), 0, []
    for gap_ns, value in steps:
        t_ns += gap_ns
        past.append((t_ns, value))
        confirmed = debounce.step(t_ns, HIGH.reached(value))
        for index, band in enumerate(HIGH.bands[: confirmed + 1]):
            if index < confirmed:
                continue  # a lower band rides on a higher one that is quicker
            tail = []
            for at, v in reversed(past):
                if v < band.limit:
                    break
                tail.append(at)
            assert t_ns - tail[-1] >= band.for_ns


@given(st.floats(0, 100), st.sampled_from([HIGH, LOW]))
def test_what_reaches_a_band_also_holds_it(value: float, ladder: Ladder) -> None:
    reached = ladder.reached(value)
    assert reached < 0 or ladder.held(value, reached) == reached
