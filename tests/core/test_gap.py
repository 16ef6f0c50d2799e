"""A gap is told as measured or as unknown, whatever is left of the notes and the clocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbox.clock import BOOT_ID_FILE
from tbox.durable import OsStorage, TwoCopies
from tbox.gap import FrameGaps, LastFrame, last_frames, resumed
from tbox.model import NS_PER_S, Now, TimeQuality

RTC, NTP, GNSS = TimeQuality.RTC, TimeQuality.NTP, TimeQuality.GNSS
WALL_NS = 1_800_000_000 * NS_PER_S
UNKNOWN = {"gap_s": None, "clock": None, "upper_bound": False}


def last_at(mono_s: float, wall_s: float | None = None, quality: TimeQuality = RTC) -> LastFrame:
    wall_ns = None if wall_s is None else WALL_NS + int(wall_s * NS_PER_S)
    mono_ns = int(mono_s * NS_PER_S)
    return LastFrame(start=3, boot_id="one", mono_ns=mono_ns, wall_ns=wall_ns, quality=quality, final=True)


def test_within_a_boot_the_monotonic_clock_tells_whatever_the_wall_clock_did() -> None:
    gap = resumed(last_at(100, 0, NTP), "one", 104_250_000_000, Now(105 * NS_PER_S, WALL_NS, NTP))
    assert gap == {"since": 3, "gap_s": 4.25, "clock": "monotonic", "upper_bound": False}


def test_over_a_boot_the_wall_clocks_tell_when_both_are_vouched_for() -> None:
    now = Now(9 * NS_PER_S, WALL_NS + 60 * NS_PER_S, GNSS)
    gap = resumed(last_at(100, 5, NTP), "two", 8 * NS_PER_S, now)
    assert gap == {"since": 3, "gap_s": 54.0, "clock": "wall", "upper_bound": False}


@pytest.mark.parametrize(
    ("last", "now"),
    [
        (last_at(100, 5, RTC), Now(NS_PER_S, WALL_NS + 60 * NS_PER_S, NTP)),
        (last_at(100, 5, NTP), Now(NS_PER_S, WALL_NS + 60 * NS_PER_S, RTC)),
        (last_at(100), Now(NS_PER_S, WALL_NS, NTP)),
        (last_at(100, 5, NTP), Now(NS_PER_S)),
        (last_at(100, 5, NTP), Now(NS_PER_S, WALL_NS, NTP)),  # set back meanwhile
    ],
)
def test_over_a_boot_a_wall_clock_that_cannot_be_believed_tells_nothing(last: LastFrame, now: Now) -> None:
    assert resumed(last, "two", NS_PER_S, now) == {"since": 3} | UNKNOWN


def test_a_monotonic_clock_that_ran_backwards_tells_nothing() -> None:
    assert resumed(last_at(100), "one", 99 * NS_PER_S, Now(99 * NS_PER_S)) == {"since": 3} | UNKNOWN


def test_two_boots_that_nobody_can_tell_apart_are_not_taken_for_one() -> None:
    nameless = LastFrame(start=3, boot_id="", mono_ns=0, wall_ns=None, quality=RTC, final=True)
    assert resumed(nameless, "", NS_PER_S, Now(NS_PER_S))["gap_s"] is None


def test_a_stop_says_when_each_bus_was_last_heard() -> None:
    told = last_frames({"can0": (5, 70), "can1": None}, Now(100, 1000, RTC))
    assert told == {"can0": {"mono_ns": 70, "wall_ns": 970}, "can1": None}
    assert last_frames({"can0": (5, 70)}, Now(100)) == {"can0": {"mono_ns": 70, "wall_ns": None}}


class Starts:
    """Starts one after another in one state directory."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._start = directory, 0

    def next(self) -> FrameGaps:
        self._start += 1
        return FrameGaps(OsStorage(), str(self._directory), self._start)


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


needs_boot_id = pytest.mark.skipif(not Path(BOOT_ID_FILE).exists(), reason="this system names no boot")


@needs_boot_id
def test_each_bus_is_told_once_at_its_first_frame_of_a_later_start(starts: Starts) -> None:
    first = starts.next()
    assert first.tell({"can0": (10, 20), "can1": (11, 12)}, Now(20)) == []  # nothing was before it
    first.note({"can0": (10, 3 * NS_PER_S), "can1": (11, 12)}, Now(4 * NS_PER_S), final=True)
    second = starts.next()
    assert second.tell({"can0": None, "can1": None}, Now(5 * NS_PER_S)) == []
    spans = {"can0": (7 * NS_PER_S, 8 * NS_PER_S), "can1": None}
    (told,) = second.tell(spans, Now(8 * NS_PER_S))
    assert told == {
        "event": "frames_resumed", "bus": "can0", "since": 1, "gap_s": 4.0, "clock": "monotonic",
        "upper_bound": False,
    }  # fmt: skip
    assert second.tell(spans, Now(9 * NS_PER_S)) == []
    second.note(spans, Now(9 * NS_PER_S), final=True)
    told, other = starts.next().tell(
        {"can0": (10 * NS_PER_S, 10 * NS_PER_S), "can1": (12 * NS_PER_S + 12, 13 * NS_PER_S)}, Now(0)
    )
    assert (told["since"], told["gap_s"]) == (2, 2.0)
    assert (other["bus"], other["since"], other["gap_s"]) == ("can1", 1, 12.0)  # silent all through start 2


@needs_boot_id
def test_after_a_kill_the_gap_is_an_upper_bound_from_the_last_note(starts: Starts) -> None:
    killed = starts.next()
    killed.tell({"can0": (0, NS_PER_S)}, Now(NS_PER_S))  # noted at once, not at the next health record
    (told,) = starts.next().tell({"can0": (3 * NS_PER_S, 3 * NS_PER_S)}, Now(0))
    assert (told["since"], told["gap_s"], told["upper_bound"]) == (1, 2.0, True)


def test_over_a_boot_the_gap_is_told_again_once_the_clock_is_vouched_for(
    starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Pi's clock is set seconds after its first frame."""
    monkeypatch.setattr("tbox.gap._boot_id", lambda _: "one")
    spans = {"can0": (10 * NS_PER_S, 20 * NS_PER_S), "can1": (10 * NS_PER_S, 20 * NS_PER_S)}
    starts.next().note(spans, Now(20 * NS_PER_S, WALL_NS, NTP), final=True)
    monkeypatch.setattr("tbox.gap._boot_id", lambda _: "two")
    rebooted, first = starts.next(), {"can0": (3 * NS_PER_S, 4 * NS_PER_S), "can1": None}
    (told,) = rebooted.tell(first, Now(4 * NS_PER_S, WALL_NS - 3600 * NS_PER_S, RTC))
    assert told["gap_s"] is None
    assert rebooted.tell(first, Now(5 * NS_PER_S, WALL_NS - 3599 * NS_PER_S, RTC)) == []
    second = first | {"can1": (8 * NS_PER_S, 8 * NS_PER_S)}
    can1, can0 = rebooted.tell(second, Now(9 * NS_PER_S, WALL_NS + 30 * NS_PER_S, NTP))
    assert can0 == {
        "event": "frames_resumed", "bus": "can0", "since": 1, "gap_s": 24.0, "clock": "wall",
        "upper_bound": False,
    }  # fmt: skip
    assert (can1["bus"], can1["gap_s"]) == ("can1", 29.0)
    assert rebooted.tell(second, Now(10 * NS_PER_S, WALL_NS + 31 * NS_PER_S, NTP)) == []


@pytest.mark.parametrize("harm", ["missing", "torn", "not what was written"])
def test_without_the_notes_the_gap_is_unknown_and_they_begin_anew(
    tmp_path: Path, starts: Starts, harm: str
) -> None:
    starts.next().note({"can0": (0, 1)}, Now(1), final=True)
    for path in tmp_path.iterdir():
        if harm == "torn":
            path.write_bytes(path.read_bytes()[:-3])
        else:
            path.unlink()
    if harm == "not what was written":
        TwoCopies(OsStorage(), str(tmp_path), "frames").write(b"\x93\x01")
    second = starts.next()
    expected = {"event": "frames_resumed", "bus": "can0", "since": None} | UNKNOWN
    assert second.tell({"can0": (5, 6)}, Now(6)) == [expected]
    second.note({"can0": (5, 6)}, Now(6), final=True)
    assert starts.next().tell({"can0": (7, 7)}, Now(7))[0]["since"] == 2


def test_a_medium_that_refuses_costs_the_notes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "frames.0").mkdir()
    (tmp_path / "frames.1").mkdir()
    gaps = FrameGaps(OsStorage(), str(tmp_path), 2)
    assert [told["gap_s"] for told in gaps.tell({"can0": (5, 6)}, Now(6))] == [None]
