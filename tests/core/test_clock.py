"""The wall clock is believed only when it can be right, and a jump says so; starts never repeat."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.clock import (
    MAXERROR_US_UNSET,
    START_JUMP,
    WALL_CEILING_NS,
    WALL_FLOOR_NS,
    WALL_JUMP_NS_MIN,
    Deadline,
    Offset,
    StartNumberError,
    SystemClock,
    TimeKeeper,
    Timex,
    kernel_quality,
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


# --- who keeps the machine's clock -----------------------------------------------------------------------


def kernel(maxerror_us: int, answer: int = 0) -> Callable[[ctypes.Structure], int]:
    """A kernel that answers adjtimex(2) so."""

    def adjtimex(timex: ctypes.Structure) -> int:
        assert isinstance(timex, Timex) and timex.modes == 0, "it would set the clock"
        timex.maxerror = maxerror_us
        return answer

    return adjtimex


@pytest.mark.parametrize(
    ("maxerror_us", "answer", "quality"),
    [
        (0, 0, NTP),
        (250_000, 0, NTP),
        (250_000, 5, NTP),  # TIME_ERROR, and yet kept: a chrony that does not set the battery-backed clock
        (MAXERROR_US_UNSET - 1, 0, NTP),
        (MAXERROR_US_UNSET, 5, RTC),
        (MAXERROR_US_UNSET + 1, 0, RTC),
        (0, -1, RTC),  # forbidden here
    ],
)
def test_the_kernel_says_whether_somebody_keeps_its_clock(
    maxerror_us: int, answer: int, quality: TimeQuality
) -> None:
    assert kernel_quality(kernel(maxerror_us, answer)) == quality


def test_a_system_that_cannot_be_asked_has_a_clock_that_nobody_keeps() -> None:
    def absent(_: ctypes.Structure) -> int:
        raise AttributeError("undefined symbol: adjtimex")

    assert kernel_quality(absent) == RTC


class WholeTimex(ctypes.Structure):
    """`struct timex` as adjtimex(2) has it, up to a field whose value is known."""

    _fields_ = (
        *Timex._fields_[:-1],
        ("esterror", ctypes.c_long), ("status", ctypes.c_int), ("constant", ctypes.c_long),
        ("precision", ctypes.c_long), ("tolerance", ctypes.c_long), ("seconds", ctypes.c_long),
    )  # fmt: skip


def test_the_machine_itself_can_be_asked() -> None:
    """Were the layout another, the time behind the field that is read would be nonsense."""
    found = []

    def adjtimex(timex: ctypes.Structure) -> int:
        whole = WholeTimex.from_buffer(timex)
        answer: int = ctypes.CDLL(None).adjtimex(ctypes.byref(whole))
        found.append(whole.seconds)
        return answer

    before_s = int(time.time())
    quality = kernel_quality(adjtimex)
    assert quality in (RTC, NTP) and quality == kernel_quality()
    if found[0]:
        assert before_s - 1 <= found[0] <= time.time() + 1


def test_the_clock_is_asked_at_every_look_and_tells_when_it_gains_a_keeper() -> None:
    mono_ns, wall_ns, quality = 0, 17, RTC
    clock = SystemClock(lambda: mono_ns, lambda: wall_ns, lambda: quality)
    assert clock.look() == (Now(0), None)
    mono_ns, wall_ns = NS_PER_S, GOOD_NS  # somebody read a battery-backed clock
    assert clock.look()[1] == Offset(mono_ns, GOOD_NS, GOOD_NS - mono_ns, RTC, first=True)
    mono_ns, wall_ns, quality = 2 * NS_PER_S, GOOD_NS + 61 * NS_PER_S, NTP
    now, offset = clock.look()
    assert now == Now(mono_ns, wall_ns, NTP) and clock.now() == now
    assert offset == Offset(mono_ns, wall_ns, 60 * NS_PER_S, NTP, first=False)
    quality = RTC  # nobody was reached for hours
    assert clock.look() == (Now(mono_ns, wall_ns, RTC), None)


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
