"""Tests of the tests: each of these bugs, planted into the edge, is caught by a test of its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tbox.edge import isolation, thermal
from tbox.edge.alarms import Alarm
from tbox.edge.bands import Debounce, Ladder
from tbox.edge.isolation import Isolation
from tbox.edge.pack import Pack
from tbox.edge.readings import Scalar, items
from tbox.model import SampleBatch
from tests.core import (
    test_alarms,
    test_bands,
    test_edge_pack,
    test_engine,
    test_isolation,
    test_stage,
    test_thermal,
)

Plant = Callable[[pytest.MonkeyPatch], None]


def no_cut(patch: pytest.MonkeyPatch) -> None:
    """A scan's end inside a batch is overlooked: rules see cells of two scans."""
    patch.setattr(Pack, "_cut", lambda self, slots: len(slots))


def half_a_cycle(patch: pytest.MonkeyPatch) -> None:
    """Any cell ends a scan."""
    patch.setattr("tbox.edge.pack.Series.complete", lambda self, heard, t_ns: bool(heard.any()))


def sentinels_believed(patch: pytest.MonkeyPatch) -> None:
    """Validity is not looked at."""
    take = Pack.take

    def careless(self: Pack, samples: Any, now_ns: int, *limits: Any) -> Any:
        valid = np.zeros_like(samples.validity)
        believed = SampleBatch(samples.t_ns, samples.column, samples.value, valid)
        return take(self, believed, now_ns, *limits)

    patch.setattr(Pack, "take", careless)


def no_debounce(patch: pytest.MonkeyPatch) -> None:
    """A limit counts at once."""
    patch.setattr(Debounce, "step", lambda self, t_ns, reached: reached)


def no_hysteresis(patch: pytest.MonkeyPatch) -> None:
    """A band is left at its limit instead of its clear level."""
    patch.setattr(Ladder, "held", lambda self, value, top: min(self.reached(value), top))


def slope_alone(patch: pytest.MonkeyPatch) -> None:
    """dT/dt alone makes a runaway."""
    patch.setattr(thermal.Runaway, "_cause", lambda self, t_ns, degrees: "it warms")


def no_sustained_time(patch: pytest.MonkeyPatch) -> None:
    """A slope of a moment makes a runaway."""
    patch.setattr(
        thermal.Runaway, "_lasting",
        lambda self, t_ns, rise: None if rise is None else items(rise),
    )  # fmt: skip


def hold_on_silence(patch: pytest.MonkeyPatch) -> None:
    """The last value goes on confirming though nothing more is heard."""
    step = test_stage.Rig.take
    last: list[Any] = []

    def stubborn(self: Any, samples: Any) -> Any:
        if len(samples):
            last[:] = [samples]
        was = last[0]
        again = SampleBatch(np.full_like(was.t_ns, self.t_ns), was.column, was.value, was.validity)
        return step(self, samples if len(samples) else again)

    patch.setattr(test_stage.Rig, "take", stubborn)


def never_damped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Alarm, "_count_raise", lambda self, t_ns: False)


def no_rate_limit(patch: pytest.MonkeyPatch) -> None:
    """The request is sent at every step."""
    frames = Isolation._frames

    def eager(self: Any, t_ns: int, drafts: Any) -> Any:
        self._next_ns = -(1 << 62)
        return frames(self, t_ns, drafts)

    patch.setattr(Isolation, "_frames", eager)


def crc_without_data_id(patch: pytest.MonkeyPatch) -> None:
    crc = isolation.crc8_j1850
    patch.setattr(isolation, "crc8_j1850", lambda data: crc(data[:-1]))


CAUGHT: dict[Plant, Callable[[], object]] = {
    no_cut: test_edge_pack.test_a_batch_that_ends_a_scan_and_begins_the_next_is_cut_there,
    half_a_cycle: test_edge_pack.test_a_scan_moves_only_when_every_cell_was_heard_anew,
    sentinels_believed: test_stage.test_sentinels_trip_nothing_however_long_they_last,
    no_debounce: test_bands.test_a_limit_counts_after_its_time_without_a_break,
    no_hysteresis: test_bands.test_a_band_is_held_until_its_clear_level,
    slope_alone: test_thermal.test_the_slope_alone_never_counts,
    no_sustained_time: test_thermal.test_a_slope_that_does_not_last_does_not_count,
    hold_on_silence: test_stage.test_a_value_seen_once_and_then_silence_confirms_nothing,
    never_damped: test_alarms.test_a_flapping_alarm_is_damped_says_so_and_ends_only_after_calm,
    no_rate_limit: test_isolation.test_a_demand_is_sent_at_once_and_repeated_at_its_rate_until_acknowledged,
    crc_without_data_id: test_isolation.test_the_frame_reads_back_through_the_dbc_and_its_crc_holds,
}


SLOW = pytest.mark.slow  # hypothesis shrinks what it finds


@pytest.mark.parametrize(
    "plant",
    [pytest.param(plant, marks=SLOW if plant is crc_without_data_id else ()) for plant in CAUGHT],
    ids=lambda plant: plant.__name__,
)
def test_a_planted_bug_is_caught(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    CAUGHT[plant]()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        CAUGHT[plant]()


def test_a_fault_test_fails_when_its_rule_is_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tbox.edge.watches._per_volt", lambda scalars: Scalar(None))
    with pytest.raises(AssertionError):
        test_engine.test_each_fault_is_told_within_its_rules_time("isolation lost")
