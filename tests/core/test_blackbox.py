"""Tests of the black box: every frame of the window, each once, in bounded memory and bounded records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.edge.blackbox import (
    PARTS_PER_STEP_MAX,
    BlackBox,
    BlackBoxSettings,
    CaptureDamaged,
    unpack_part,
)
from tbox.ledger import StageLedger
from tbox.model import CANFD_FDF, FRAME_DTYPE, NS_PER_MS, NS_PER_S, Draft, FrameBatch, Level, Now

RECORD_ROOM_BYTES = 63 * 1024


def at(ms: int) -> Now:
    return Now(ms * NS_PER_MS)


def frames(
    times_ms: Sequence[int], channel: int = 0, length: int = 64, seed: int | None = None
) -> FrameBatch:
    """Frames numbered in their data; with a seed the data is noise that does not compress."""
    array = np.zeros(len(times_ms), dtype=FRAME_DTYPE)
    array["id"] = 0x100 + channel
    array["len"] = length
    array["flags"] = CANFD_FDF if length > 8 else 0
    if seed is not None:
        noise = np.random.default_rng(seed).integers(0, 256, (len(times_ms), length), dtype=np.uint8)
        array["data"][:, :length] = noise
    array["data"][:, :4] = np.array(times_ms, dtype="<u4").view(np.uint8).reshape(-1, 4)
    return FrameBatch(channel, array, np.array(times_ms, dtype=np.int64) * NS_PER_MS)


def alarm(ms: int, name: str = "cell_over_voltage", event: str = "raise", level: int = 3) -> Draft:
    return Draft("alarm", Level(level), ms * NS_PER_MS, {"alarm": name, "event": event, "key": "cell 1"})


class Box:
    """Feeds a black box a steady bus, a batch every step_ms, and gathers what comes out."""

    def __init__(self, step_ms: int = 100, frame_ms: int = 10, channels: int = 1, **limits: Any) -> None:
        self.account = StageLedger("blackbox", "frames")
        self.box = BlackBox(self.account, BlackBoxSettings(**limits))
        self.step_ms, self.frame_ms, self.channels = step_ms, frame_ms, channels
        self.ms = 0
        self.drafts: list[Draft] = []
        self.box.step(at(0), None)

    def run(self, seconds: float, length: int = 64) -> None:
        for _ in range(int(seconds * 1000 / self.step_ms)):
            times = range(self.ms, self.ms + self.step_ms, self.frame_ms)
            self.ms += self.step_ms
            for channel in range(self.channels):
                self.drafts += self.box.step(at(self.ms), frames(times, channel, length))
            self.account.check()

    def trigger(self, **kind: Any) -> None:
        self.drafts += self.box.trigger(at(self.ms), alarm(self.ms, **kind))

    def clear(self, **kind: Any) -> None:
        self.box.clear(at(self.ms), alarm(self.ms, event="clear", **kind))


def bodies(drafts: Sequence[Draft], event: str) -> list[dict[str, Any]]:
    return [draft.body for draft in drafts if draft.body["event"] == event]


def captured_ms(drafts: Sequence[Draft], channel: int = 0) -> list[int]:
    batches = [unpack_part(body) for body in bodies(drafts, "frames")]
    return [int(t) // NS_PER_MS for batch in batches if batch.channel == channel for t in batch.t_ns]


def test_an_alarm_seals_thirty_seconds_before_and_after_each_frame_once() -> None:
    box = Box(channels=2)
    box.run(50)
    box.trigger()
    box.run(40)
    (begin,), (end,) = bodies(box.drafts, "begin"), bodies(box.drafts, "end")
    for channel in range(2):
        assert captured_ms(box.drafts, channel) == list(range(20_000, 80_001, 10))
    assert begin["short"] == end["short"] == []
    assert (begin["before_s"], end["after_s"], end["frames"]) == (30.0, 30.0, 2 * 6001)
    assert begin["trigger"]["alarm"] == "cell_over_voltage"
    assert [body["part"] for body in (d.body for d in box.drafts)] == list(range(end["parts"]))
    assert all(draft.kind == "capture" and draft.level is Level.INFO for draft in box.drafts)


def test_nothing_after_the_window_is_sealed_while_its_last_frames_are_awaited() -> None:
    box = Box(step_ms=50)
    box.run(35)
    box.trigger()
    box.run(0.35)
    box.run(30.5)
    (end,) = bodies(box.drafts, "end")
    assert max(captured_ms(box.drafts)) * NS_PER_MS == end["until_ns"]


def test_frames_come_back_byte_for_byte() -> None:
    box = Box()
    sent = frames([1, 2, 3, 5, 8], channel=3, length=20, seed=7)
    box.box.step(at(10), sent)
    box.drafts += box.box.trigger(at(10), alarm(10))
    box.drafts += box.box.flush(at(20))
    (part,) = [unpack_part(body) for body in bodies(box.drafts, "frames")]
    assert part.channel == 3
    assert np.array_equal(part.frames, sent.frames) and np.array_equal(part.t_ns, sent.t_ns)


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        (alarm(0, level=2), "a warning"),
        (alarm(0, event="clear"), "a clear"),
    ],
)
def test_lesser_drafts_seal_nothing(draft: Draft, why: str) -> None:
    assert Box().box.trigger(at(0), draft) == [], why


def test_an_update_of_a_captured_alarm_seals_nothing_but_an_escalation_does() -> None:
    box = Box(after_s=1.0)
    box.run(5)
    box.trigger(event="update", level=4)
    box.run(5)
    box.trigger(event="update", level=4)
    box.run(5)
    assert len(bodies(box.drafts, "begin")) == 1
    box.clear()
    box.trigger(event="raise")
    assert len(bodies(box.drafts, "begin")) == 2


def test_a_trigger_during_a_capture_extends_it() -> None:
    box = Box()
    box.run(40)
    box.trigger()
    box.run(20)
    box.trigger(name="over_temperature")
    box.run(40)
    (end,) = bodies(box.drafts, "end")
    assert end["after_s"] == 50.0 and end["short"] == []
    assert [trigger["alarm"] for trigger in end["triggers"]] == ["cell_over_voltage", "over_temperature"]
    assert captured_ms(box.drafts) == list(range(10_000, 90_001, 10))


def test_a_cleared_alarm_ends_the_capture_and_it_says_so() -> None:
    box = Box()
    box.run(40)
    box.trigger()
    box.trigger(name="over_temperature")
    box.run(5)
    box.clear()
    box.run(5)
    box.clear(name="over_temperature")
    box.run(5)
    (end,) = bodies(box.drafts, "end")
    assert (end["after_s"], end["short"]) == (10.0, ["cleared"])


def test_a_capture_soon_after_another_continues_it_without_a_hole() -> None:
    box = Box()
    box.run(40)
    box.trigger()
    box.run(2)
    box.clear()
    box.run(10)
    box.trigger()
    box.run(40)
    begin = bodies(box.drafts, "begin")[1]
    assert begin["short"] == ["continues 1"] and begin["before_s"] == pytest.approx(10.0)
    assert captured_ms(box.drafts) == list(range(10_000, 82_001, 10))


def test_a_new_start_has_less_to_tell_and_says_so() -> None:
    box = Box()
    box.run(5)
    box.trigger()
    (begin,) = bodies(box.drafts, "begin")
    assert (begin["before_s"], begin["short"]) == (5.0, ["start"])


def test_a_stop_seals_what_there_is() -> None:
    box = Box()
    box.run(40)
    box.trigger()
    box.run(3)
    box.drafts += box.box.flush(at(box.ms))
    (end,) = bodies(box.drafts, "end")
    assert (end["after_s"], end["short"]) == (3.0, ["stop"])
    assert captured_ms(box.drafts) == list(range(10_000, 43_000, 10))
    assert box.box.flush(at(box.ms)) == []


def test_what_nobody_asked_for_ends_with_the_process_and_is_counted() -> None:
    box = Box(channels=2)
    box.run(3)
    box.drafts += box.box.flush(at(box.ms))
    assert box.drafts == [] and box.account.held == 0
    assert box.account.dropped == {"stop": 600}
    assert box.box.status()["ring_bytes"] == 0


def test_a_frame_that_claims_more_bytes_than_any_can_hold_spoils_no_other() -> None:
    box = Box()
    sent = frames([1, 2, 3], length=8)
    sent.frames["len"][1] = 255
    box.box.step(at(10), sent)
    box.drafts += box.box.trigger(at(10), alarm(10))
    box.drafts += box.box.flush(at(20))
    (part,) = [unpack_part(body) for body in bodies(box.drafts, "frames")]
    assert part.frames["len"].tolist() == [8, 64, 8]
    assert np.array_equal(part.frames["data"], sent.frames["data"])
    assert sent.frames["len"][1] == 255, "what others hold too is not written to"


def test_a_full_ring_forgets_the_oldest_and_says_so() -> None:
    box = Box(frame_ms=1, ring_bytes_max=1_000_000)
    box.run(30)
    assert box.box.status()["ring_bytes"] <= 1_000_000
    box.trigger()
    (begin,) = bodies(box.drafts, "begin")
    assert begin["short"] == ["ring_limit"] and 9 < begin["before_s"] < 13
    box.run(31)
    times = captured_ms(box.drafts)
    assert times == list(range(times[0], 60_001)), "whatever is told of is there without a hole"
    assert times[0] == pytest.approx(30_000 - begin["before_s"] * 1000, abs=1)


def test_an_endless_alarm_ends_in_bounded_captures_and_a_refusal() -> None:
    box = Box(frame_ms=100, after_s=10, before_s=5, capture_s_max=20, captures_per_hour_max=3)
    for _ in range(30):
        box.run(5)
        box.clear()
        box.trigger()
    begins, refused = bodies(box.drafts, "begin"), bodies(box.drafts, "capture_refused")
    assert len(begins) == 3 and refused and refused[0]["limit_per_hour"] == 3
    assert all(end["after_s"] <= 20 for end in bodies(box.drafts, "end"))


def test_thirty_seconds_at_line_rate_fit_the_ring_and_leave_in_small_steps() -> None:
    account = StageLedger("blackbox", "frames")
    box = BlackBox(account)
    batch = frames([0] * 100, seed=1)
    for i in range(3200):  # 10,000 frames/s for 32 s
        box.step(Now(i * 10 * NS_PER_MS), FrameBatch(0, batch.frames, np.full(100, i * 10 * NS_PER_MS)))
    assert account.held >= 300_000 and account.dropped["limit"] == 0
    assert box.status()["ring_bytes"] <= 26_000_000
    box.trigger(Now(32 * NS_PER_S), alarm(32_000))
    drafts = box.step(Now(32 * NS_PER_S + 1), None)
    assert 0 < len(drafts) <= 4 * PARTS_PER_STEP_MAX
    account.check()


def test_noise_that_does_not_compress_still_fits_a_record() -> None:
    box = Box()
    for i in range(20):
        box.box.step(at(i * 100), frames(range(i * 100, i * 100 + 100), seed=i))
    box.drafts += box.box.trigger(at(2000), alarm(2000))
    box.drafts += box.box.flush(at(2000))
    assert max(len(body["frames"]) for body in bodies(box.drafts, "frames")) < RECORD_ROOM_BYTES
    assert captured_ms(box.drafts) == list(range(2000))


def test_classic_frames_take_a_third_of_the_room() -> None:
    wide, narrow = Box(), Box()
    wide.run(29)
    narrow.run(29, length=8)
    assert narrow.box.status()["ring_bytes"] <= wide.box.status()["ring_bytes"]
    narrow.box.step(at(narrow.ms), frames([narrow.ms], length=64))
    narrow.run(0.5, length=8)
    narrow.trigger()
    narrow.drafts += narrow.box.flush(at(narrow.ms))
    assert len(captured_ms(narrow.drafts)) == narrow.account.into


def part_body() -> dict[str, Any]:
    box = Box()
    box.run(1)
    box.trigger()
    box.drafts += box.box.flush(at(box.ms))
    return bodies(box.drafts, "frames")[0]


@given(st.data())
def test_a_damaged_part_is_refused_or_read_never_worse(data: st.DataObject) -> None:
    body = dict(part_body())
    name = data.draw(st.sampled_from(["count", "width", "first_ns", "frames", "channel"]))
    body[name] = data.draw(
        st.none()
        | st.integers()
        | st.binary(max_size=40)
        | st.text(max_size=5)
        | st.just(body["frames"][:-3])
    )
    try:
        unpack_part(body)
    except CaptureDamaged as error:
        assert "capture part" in str(error)


step = st.tuples(
    st.integers(1, 4000),  # ms
    st.integers(0, 30),  # frames
    st.integers(0, 2),  # channel
    st.sampled_from([0, 8, 12, 64]),
    st.sampled_from(["", "", "", "raise", "clear", "other"]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(step, max_size=60))
def test_every_frame_is_sealed_once_or_accounted_for_and_windows_have_no_holes(
    story: list[tuple[int, int, int, int, str]],
) -> None:
    account = StageLedger("blackbox", "frames")
    box = BlackBox(
        account, BlackBoxSettings(before_s=3, after_s=4, capture_s_max=8, captures_per_hour_max=1000)
    )
    box.step(at(0), None)
    ms = 0
    drafts: list[Draft] = []
    given_ms: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for wait, count, channel, length, event in story:
        times = sorted({ms + (i + 1) * wait // (count + 1) for i in range(count)})
        ms += wait
        given_ms[channel] += times
        drafts += box.step(at(ms), frames(times, channel, length))
        if event == "clear":
            box.clear(at(ms), alarm(ms, event="clear"))
        elif event:
            drafts += box.trigger(at(ms), alarm(ms, name="other" if event == "other" else "first"))
        account.check()
    drafts += box.flush(at(ms))
    account.check()
    ends = bodies(drafts, "end")
    assert len(ends) == len(bodies(drafts, "begin"))
    for channel, times in given_ms.items():
        wanted = {t for t in times for e in ends if e["from_ns"] <= t * NS_PER_MS <= e["until_ns"]}
        assert sorted(captured_ms(drafts, channel)) == sorted(wanted)
    assert account.out == sum(end["frames"] for end in ends)
