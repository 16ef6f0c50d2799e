"""The wall clock is believed only when it can be right, and a jump says so; starts never repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.clock import (
    START_JUMP,
    WALL_CEILING_NS,
    WALL_FLOOR_NS,
    WALL_JUMP_NS_MIN,
    Deadline,
    StartNumberError,
    TimeKeeper,
    next_start,
)
from tbox.durable import OsStorage
from tbox.model import NS_PER_S, Now, TimeQuality

GOOD_NS = WALL_FLOOR_NS + 10**17
RTC, NTP, GNSS = TimeQuality.RTC, TimeQuality.NTP, TimeQuality.GNSS


@pytest.mark.parametrize("wall_ns", [0, 946_684_800 * NS_PER_S, WALL_FLOOR_NS - 1, WALL_CEILING_NS, 2**62])
def test_1970_2000_and_2100_are_not_believed(wall_ns: int) -> None:
    assert TimeKeeper().look(5, wall_ns, NTP) == (Now(5, None), None)


def test_the_first_plausible_time_is_an_offset_from_the_monotonic_clock() -> None:
    now, offset = TimeKeeper().look(5, GOOD_NS, RTC)
    assert now == Now(5, GOOD_NS, RTC)
    assert offset is not None and offset.first and offset.step_ns == GOOD_NS - 5


def test_a_clock_that_runs_on_says_nothing_and_a_jump_says_by_how_much() -> None:
    keeper = TimeKeeper()
    keeper.look(0, GOOD_NS, RTC)
    assert keeper.look(NS_PER_S, GOOD_NS + NS_PER_S + 1000, RTC)[1] is None
    _, jump = keeper.look(2 * NS_PER_S, GOOD_NS + 3602 * NS_PER_S, RTC)
    assert jump is not None and not jump.first
    assert abs(jump.step_ns - 3600 * NS_PER_S) <= 1000


def test_a_clock_that_falls_back_to_1970_keeps_the_time_that_was_known() -> None:
    keeper = TimeKeeper()
    keeper.look(0, GOOD_NS, GNSS)
    now, offset = keeper.look(NS_PER_S, 17, RTC)
    assert now == Now(NS_PER_S, GOOD_NS + NS_PER_S, GNSS)
    assert offset is None


def test_a_better_source_is_told_even_without_a_jump() -> None:
    keeper = TimeKeeper()
    keeper.look(0, GOOD_NS, RTC)
    _, offset = keeper.look(1, GOOD_NS + 1, NTP)
    assert offset is not None and offset.quality == NTP and offset.step_ns == 0


@given(st.lists(st.tuples(st.integers(0, NS_PER_S), st.integers(0, 2**62), st.sampled_from(TimeQuality))))
def test_offsets_always_re_date_to_what_the_clock_said(looks: list[tuple[int, int, TimeQuality]]) -> None:
    keeper, mono, offset_sum = TimeKeeper(), 0, 0
    for step, wall, quality in looks:
        mono += step
        now, offset = keeper.look(mono, wall, quality)
        if offset:
            offset_sum += offset.step_ns
            assert mono + offset_sum == wall
        if now.wall_ns is not None:
            assert abs(now.wall_ns - mono - offset_sum) < WALL_JUMP_NS_MIN * (len(looks) + 1)


def test_a_deadline_counts_down_and_passes() -> None:
    deadline = Deadline.after(0, 2.0)
    assert deadline.left_s(NS_PER_S) == 1.0 and not deadline.passed(NS_PER_S)
    assert deadline.passed(2 * NS_PER_S) and deadline.left_s(3 * NS_PER_S) == 0.0


class TestStartNumber:
    def test_it_counts_up_from_one(self, tmp_path: Path) -> None:
        assert [next_start(OsStorage(), str(tmp_path), seen=0) for _ in range(4)] == [1, 2, 3, 4]

    @pytest.mark.parametrize("copy", ["start.0", "start.1"])
    def test_one_damaged_copy_changes_nothing_that_matters(self, tmp_path: Path, copy: str) -> None:
        for _ in range(3):
            last = next_start(OsStorage(), str(tmp_path), seen=0)
        (tmp_path / copy).write_bytes(b"garbage")
        assert next_start(OsStorage(), str(tmp_path), seen=last) > last

    def test_when_lost_it_jumps_above_any_that_was_seen(self, tmp_path: Path) -> None:
        assert next_start(OsStorage(), str(tmp_path), seen=41) == 41 + START_JUMP

    def test_when_both_copies_are_damaged_it_jumps(self, tmp_path: Path) -> None:
        for _ in range(2):
            next_start(OsStorage(), str(tmp_path), seen=0)
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        assert next_start(OsStorage(), str(tmp_path), seen=0) == START_JUMP

    def test_a_missing_directory_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(StartNumberError, match="make the directory writable"):
            next_start(OsStorage(), str(tmp_path / "none"), seen=0)
