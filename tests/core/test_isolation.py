"""The isolation request: a frame the BMS can check, asked until answered, withdrawn, limited, or dry."""

from __future__ import annotations

from itertools import pairwise

import cantools
from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.isolation import (
    COUNTER_VALUES,
    DATA_ID,
    TRANSITIONS,
    Demand,
    Event,
    IllegalEvent,
    Isolation,
    IsolationSettings,
    State,
    crc8_j1850,
    next_state,
    request_frame,
)
from tbox.model import CanSend, Draft
from tests.tables import check_pair, every_pair

MS = 1_000_000
HOT = [Demand("thermal-runaway", "pack", 17)]
SEND = IsolationSettings(mode="send")

# The layout as the DBC says it, so that the bytes are judged by another than ourselves.
DBC = """VERSION ""
BS_:
BU_: TBOX BMS
BO_ 1776 TBOX_IsolationRequest: 8 TBOX
 SG_ CRC : 0|8@1+ (1,0) [0|255] "" BMS
 SG_ AliveCounter : 8|4@1+ (1,0) [0|14] "" BMS
 SG_ IsolationRequest : 16|8@1+ (1,0) [0|1] "" BMS
 SG_ IsolationReason : 24|8@1+ (1,0) [0|255] "" BMS
 SG_ IsolationIndex : 32|16@1+ (1,0) [0|65535] "" BMS
"""


def test_the_crc_is_the_one_of_sae_j1850() -> None:
    assert crc8_j1850(b"123456789") == 0x4B


@given(st.integers(0, 14), st.integers(0, 1), st.integers(0, 255), st.integers(-1, 0xFFFE))
def test_the_frame_reads_back_through_the_dbc_and_its_crc_holds(
    c: int, request: int, reason: int, index: int
) -> None:
    data = request_frame(c, request, reason, index)
    assert len(data) == 8
    read = cantools.database.load_string(DBC).decode_message(0x6F0, data)
    assert read == {
        "CRC": crc8_j1850(data[1:] + bytes((DATA_ID,))), "AliveCounter": c, "IsolationRequest": request,
        "IsolationReason": reason, "IsolationIndex": index if index >= 0 else 0xFFFF,
    }  # fmt: skip


@given(st.binary(min_size=1, max_size=8), st.integers(0, 63))
def test_any_single_flipped_bit_breaks_the_crc(_: bytes, bit: int) -> None:
    data = bytearray(request_frame(3, 1, 1, 17))
    data[bit // 8] ^= 1 << (bit % 8)
    assert crc8_j1850(bytes(data[1:]) + bytes((DATA_ID,))) != data[0]


@every_pair(State, Event)
def test_every_pair_of_state_and_event_leads_where_the_table_says_or_raises(
    state: State, event: Event
) -> None:
    check_pair(TRANSITIONS, state, event, next_state, IllegalEvent)


def run(
    isolation: Isolation, begin_ms: int, end_ms: int, demands: list[Demand], ack: bool | None = None
) -> tuple[list[tuple[int, CanSend]], list[Draft]]:
    sends: list[tuple[int, CanSend]] = []
    drafts: list[Draft] = []
    for t_ms in range(begin_ms, end_ms, 10):
        sent, told = isolation.step(t_ms * MS, demands, ack)
        sends += [(t_ms, frame) for frame in sent]
        drafts += told
    return sends, drafts


def test_a_demand_is_sent_at_once_and_repeated_at_its_rate_until_acknowledged() -> None:
    isolation = Isolation(SEND)
    sends, drafts = run(isolation, 0, 1000, HOT, False)
    assert [t for t, _ in sends] == [0, 200, 400, 600, 800]
    assert [frame.data[1] for _, frame in sends] == [0, 1, 2, 3, 4]
    assert all(
        (f.can_id, f.fd, f.data[2], f.data[3], f.data[4]) == (0x6F0, False, 1, 1, 17) for _, f in sends
    )
    assert [draft.body["state"] for draft in drafts] == ["requested"]
    sends, drafts = run(isolation, 1000, 3000, HOT, True)
    assert len(sends) <= 1 and [draft.body["state"] for draft in drafts] == ["acknowledged"]


def test_an_unanswered_request_is_told_and_asked_on_more_slowly_but_for_ever() -> None:
    isolation = Isolation(SEND)
    sends, drafts = run(isolation, 0, 60_000, HOT, False)
    assert [draft.body["state"] for draft in drafts] == ["requested", "unanswered"]
    gaps = [b - a for (a, _), (b, _) in pairwise(sends)]
    assert min(gaps) == 200 and gaps[-1] == 1000
    counters = [frame.data[1] for _, frame in sends]
    assert all(b == (a + 1) % COUNTER_VALUES for a, b in pairwise(counters))


def test_a_request_that_the_bms_drops_is_asked_again() -> None:
    isolation = Isolation(SEND)
    run(isolation, 0, 300, HOT, False)
    run(isolation, 300, 600, HOT, True)
    sends, drafts = run(isolation, 600, 1000, HOT, False)
    assert sends and [draft.body["state"] for draft in drafts] == ["repeated"]


def test_a_cleared_demand_is_withdrawn_with_request_zero() -> None:
    isolation = Isolation(SEND)
    run(isolation, 0, 300, HOT, False)
    run(isolation, 300, 600, HOT, True)
    sends, drafts = run(isolation, 600, 5000, [], True)
    assert [frame.data[2] for _, frame in sends] == [0, 0, 0]
    assert [draft.body["state"] for draft in drafts] == ["withdrawn"]
    assert isolation.state is State.IDLE


def test_a_new_demand_does_not_wait_for_the_slots_of_the_withdrawal_before_it() -> None:
    isolation = Isolation(SEND)
    run(isolation, 0, 300, HOT, False)
    withdrawn, _ = run(isolation, 300, 450, [], False)
    again, drafts = run(isolation, 450, 460, HOT, False)
    assert [(t, frame.data[2]) for t, frame in withdrawn + again] == [(400, 0), (450, 1)]
    assert again[0][1].data[1] == (withdrawn[0][1].data[1] + 1) % COUNTER_VALUES
    assert [draft.body["state"] for draft in drafts] == ["requested"]


def test_a_flapping_demand_asks_no_faster_than_its_rate() -> None:
    isolation, sends = Isolation(SEND), []
    for t_ms in range(0, 2000, 10):
        sends += [(t_ms, f) for f in isolation.step(t_ms * MS, HOT if t_ms % 20 else [], None)[0]]
    asked = [t for t, frame in sends if frame.data[2]]
    assert len(asked) > 3 and all(b - a >= 200 for a, b in pairwise(asked))


def test_a_dry_run_tells_everything_and_sends_nothing() -> None:
    isolation = Isolation(IsolationSettings(mode="dry_run"))
    sends, drafts = run(isolation, 0, 10_000, HOT, None)
    assert sends == []
    assert [draft.body["state"] for draft in drafts] == ["requested", "unanswered"]
    assert all(draft.body["dry_run"] and draft.body["text"].startswith("dry run: ") for draft in drafts)


def test_off_is_off() -> None:
    assert run(Isolation(IsolationSettings(mode="off")), 0, 1000, HOT, False) == ([], [])


def test_the_gravest_reason_is_given_when_several_alarms_ask() -> None:
    isolation = Isolation(SEND)
    sends, _ = run(isolation, 0, 10, [Demand("cell-over-voltage", "cell 3", 3), *HOT])
    assert (sends[0][1].data[3], sends[0][1].data[4]) == (1, 17)


@given(
    st.lists(
        st.tuples(st.integers(0, 3000), st.booleans(), st.sampled_from([None, True, False])), max_size=60
    )
)
def test_it_never_sends_faster_than_its_rate_nor_without_cause(
    steps: list[tuple[int, bool, bool | None]],
) -> None:
    isolation, t_ms, asked = Isolation(SEND), 0, False
    sent: list[tuple[int, int]] = []
    for gap_ms, demanded, ack in steps:
        t_ms += gap_ms
        sends, _ = isolation.step(t_ms * MS, HOT if demanded else [], ack)
        asked = asked or demanded
        sent += [(t_ms, frame.data[2]) for frame in sends]
        assert all(frame.data[2] == int(demanded) for frame in sends)
    assert asked or not sent
    for kind in (0, 1):
        assert all(b - a >= 200 for a, b in pairwise(t for t, what in sent if what == kind))
    # Only a new demand comes sooner after what it overrules.
    assert all(b - a >= 200 or (was, now) == (0, 1) for (a, was), (b, now) in pairwise(sent))
