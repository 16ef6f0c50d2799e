"""The BMS obeys its own rules: it hears sound requests only, derates before it opens, closes again late."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.model import NS_PER_S, CanSend
from tbox.sim.ecus import (
    BREAK_CURRENT_A,
    CONTACTOR_FAILED,
    DERATE_S_MAX,
    REJOIN_S,
    TRANSITIONS,
    Bms,
    BmsEvent,
    BmsState,
    SensorKind,
    Sensors,
    decode_request,
)
from tbox.sim.faults import make_fault
from tbox.sim.packing import crc8

TICK_NS = NS_PER_S // 10
PROBE = SensorKind("probe", 0.1, -50.0, -50.0, 200.0, 1.0)


def request(counter: int, wanted: int = 1, index: int = 1, *, data_id: int = 0xF0) -> CanSend:
    body = bytes([counter, wanted, 7]) + index.to_bytes(2, "little") + b"\0\0"
    return CanSend(0, 0x6F0, bytes([crc8(body + bytes([data_id]))]) + body, fd=False)


class Bench:
    """A BMS with its key on, stepped by time."""

    def state(self) -> BmsState:
        return self.bms.state

    def closed(self) -> bool:
        return self.bms.closed

    def __init__(self, bms: Bms | None = None) -> None:
        self.bms = bms or Bms()
        self.t_ns = 0
        self.run(2.0)

    def run(
        self, seconds: float, *, current_a: float = -100.0, standing: bool = False, awake: bool = True
    ) -> None:
        for _ in range(round(seconds * 10)):
            self.t_ns += TICK_NS
            current = current_a if self.bms.closed else 0.0
            self.bms.control(self.t_ns, awake=awake, standing=standing, current_a=current)

    def hear(self, frame: CanSend) -> None:
        self.bms.receive(frame, self.t_ns)


# --- the table ------------------------------------------------------------------------------------------


def test_a_request_isolates_from_every_state_that_can_carry_current() -> None:
    for state in (BmsState.SLEEP, BmsState.PRECHARGE):
        assert TRANSITIONS[state, BmsEvent.REQUEST] is BmsState.ISOLATED
    assert TRANSITIONS[BmsState.OPERATE, BmsEvent.REQUEST] is BmsState.DERATE


def test_only_precharge_leads_to_operation() -> None:
    into = {pair for pair, state in TRANSITIONS.items() if state is BmsState.OPERATE}
    assert into == {(BmsState.PRECHARGE, BmsEvent.PRECHARGED), (BmsState.DERATE, BmsEvent.WITHDRAWN)}


def test_every_state_is_reached_and_left() -> None:
    assert {state for state, _ in TRANSITIONS} == set(BmsState) == set(TRANSITIONS.values())
    assert {event for _, event in TRANSITIONS} == set(BmsEvent)


@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.floats(-400, 400), st.sampled_from([None, 0, 1])),
        max_size=60,
    )
)
def test_whatever_happens_only_events_of_the_table_occur(
    story: list[tuple[bool, bool, float, int | None]],
) -> None:
    bms, counter = Bms(), 0
    for step, (awake, standing, current_a, wanted) in enumerate(story, start=1):
        t_ns = step * NS_PER_S
        if wanted is not None:
            counter = (counter + 1) % 15
            bms.receive(request(counter, wanted), t_ns)
        bms.control(t_ns, awake=awake, standing=standing, current_a=current_a if bms.closed else 0.0)
        assert bms.closed == (bms.state in (BmsState.OPERATE, BmsState.DERATE))
        if bms.state is BmsState.ISOLATED:
            assert bms.limit_share == 0.0


# --- hearing --------------------------------------------------------------------------------------------


def test_a_sound_request_is_acknowledged_with_its_index_before_anything_opens() -> None:
    bench = Bench()
    bench.hear(request(0, index=513))
    assert (bench.bms.ack, bench.bms.ack_index) == (True, 513)
    assert bench.closed()


@given(st.integers(0, 7), st.integers(1, 255))
def test_any_damaged_byte_makes_a_request_unsound(byte: int, flip: int) -> None:
    frame = request(3)
    data = bytearray(frame.data)
    data[byte] ^= flip
    assert decode_request(CanSend(0, 0x6F0, bytes(data), fd=False)) is None


@given(st.binary(max_size=64))
def test_noise_under_the_requests_id_is_refused_and_counted(data: bytes) -> None:
    bms = Bms()
    bms.receive(CanSend(0, 0x6F0, data), 0)
    assert bms.accepted + bms.refused == 1
    assert bms.accepted == (decode_request(CanSend(0, 0x6F0, data)) is not None)


@pytest.mark.parametrize(
    "frame",
    [
        request(0, data_id=0xF1),
        request(15),
        request(0, wanted=2),
        CanSend(0, 0x6F0, request(0).data[:7], fd=False),
        CanSend(0, 0x6F0, request(0).data + b"\0", fd=True),
    ],
    ids=["data id", "counter 15", "request 2", "short", "long"],
)
def test_a_request_that_is_not_as_documented_is_refused(frame: CanSend) -> None:
    bench = Bench()
    bench.hear(frame)
    bench.run(5.0)
    assert (bench.bms.refused, bench.bms.accepted, bench.bms.ack) == (1, 0, False)
    assert bench.state() is BmsState.OPERATE


def test_other_ids_are_not_the_bmss_business() -> None:
    bms = Bms()
    bms.receive(CanSend(0, 0x6F1, request(0).data, fd=False), 0)
    assert bms.refused == bms.accepted == 0


@pytest.mark.parametrize(("step", "accepted"), [(0, 1), (1, 2), (5, 2), (6, 1), (14, 1)])
def test_a_counter_that_stands_or_leaps_is_refused(step: int, accepted: int) -> None:
    bench = Bench()
    bench.hear(request(10))
    bench.hear(request((10 + step) % 15))
    assert (bench.bms.accepted, bench.bms.refused) == (accepted, 2 - accepted)


def test_after_two_seconds_of_silence_any_counter_is_a_fresh_start() -> None:
    bench = Bench()
    bench.hear(request(10))
    bench.run(2.1)
    bench.hear(request(10))
    assert bench.bms.accepted == 2


# --- opening and closing --------------------------------------------------------------------------------


def test_current_is_taken_to_zero_first_and_the_contactors_open_when_it_is_low() -> None:
    bench = Bench()
    bench.hear(request(0))
    shares = []
    while bench.closed():
        bench.run(0.1, current_a=-200.0 * bench.bms.limit_share)
        shares.append(bench.bms.limit_share)
    assert shares == sorted(shares, reverse=True)
    assert len(shares) <= 13
    assert bench.bms.opened_ns == [bench.t_ns]


def test_when_the_current_does_not_fall_they_open_after_three_seconds_all_the_same() -> None:
    bench = Bench()
    begin_ns = bench.t_ns
    bench.hear(request(0))
    bench.run(DERATE_S_MAX, current_a=-150.0)
    assert bench.closed()
    bench.run(0.2, current_a=-150.0)
    assert not bench.closed()
    assert (bench.t_ns - begin_ns) / NS_PER_S == pytest.approx(DERATE_S_MAX + 0.2)


def test_a_standing_vehicle_without_current_is_isolated_within_two_ticks() -> None:
    bench = Bench()
    bench.hear(request(0))
    bench.run(0.2, current_a=BREAK_CURRENT_A / 2)
    assert bench.state() is BmsState.ISOLATED


def test_a_request_withdrawn_while_derating_gives_the_power_back() -> None:
    bench = Bench()
    bench.hear(request(0))
    bench.run(0.5)
    bench.hear(request(1, wanted=0))
    bench.run(0.2)
    assert (bench.state(), bench.bms.limit_share, bench.bms.ack) == (BmsState.OPERATE, 1.0, False)
    assert not bench.bms.opened_ns


def test_it_closes_again_only_when_withdrawn_and_standing_and_after_a_precharge() -> None:
    bench = Bench()
    bench.hear(request(0))
    bench.run(5.0, standing=True)
    assert bench.state() is BmsState.ISOLATED
    bench.hear(request(1, wanted=0))
    bench.run(REJOIN_S + 1, standing=False)
    assert bench.state() is BmsState.ISOLATED
    bench.run(0.1, standing=True)
    assert bench.state() is BmsState.PRECHARGE
    bench.run(0.6, standing=True)
    assert bench.state() is BmsState.OPERATE


def test_key_off_does_not_forget_a_standing_request() -> None:
    bench = Bench()
    bench.hear(request(0))
    bench.run(5.0)
    bench.run(5.0, awake=False)
    bench.run(5.0)
    assert bench.state() is BmsState.ISOLATED


def test_welded_contactors_are_reported_and_still_carry_current() -> None:
    bench = Bench(Bms(stuck_closed=[make_fault("contactor-failed", 0.0)]))
    bench.hear(request(0))
    bench.run(5.0)
    assert (bench.state(), bench.bms.command) == (BmsState.ISOLATED, 0)
    assert bench.bms.contactor_state == CONTACTOR_FAILED
    assert bench.closed()


# --- sensors --------------------------------------------------------------------------------------------


def times(seconds: float, count: int) -> np.ndarray:
    return (np.arange(count) * seconds * NS_PER_S).astype(np.int64)


def test_readings_are_the_truth_with_the_noise_that_was_ordered() -> None:
    truth = np.full((4000, 3), 25.0)
    readings = Sensors(PROBE, [], np.random.default_rng(1)).read(times(1, 4000), truth)
    assert readings.mean() == pytest.approx(25.0, abs=0.01)
    assert readings.std() == pytest.approx(0.1, rel=0.05)


def test_a_stuck_sensor_repeats_its_last_reading_until_the_fault_ends() -> None:
    fault = make_fault("sensor-stuck", 10.0, duration_s=5.0, probe=1)
    sensors = Sensors(PROBE, [fault], np.random.default_rng(1))
    truth = np.linspace(20, 40, 40)[:, None] * np.ones(3)
    parts = [sensors.read(times(0.5, 40)[i : i + 7], truth[i : i + 7]) for i in range(0, 40, 7)]
    readings = np.concatenate(parts)
    assert len(set(readings[20:30, 1])) == 1
    assert abs(readings[30, 1] - readings[29, 1]) > 1.0
    assert len(set(readings[:, 0])) == 40


def test_an_open_sensor_sits_at_its_rail_until_the_bms_notices() -> None:
    sensors = Sensors(PROBE, [make_fault("sensor-open", 1.0, probe=0)], np.random.default_rng(1))
    readings = sensors.read(times(0.2, 20), np.full((20, 2), 25.0))[:, 0]
    assert (readings[5:10] == -50.0).all()
    assert np.isnan(readings[10:]).all()
    assert (readings[:5] > 24).all()


def test_two_requests_of_one_index_differ_only_in_counter_and_crc() -> None:
    frames = [request(counter, index=9).data for counter in range(15)]
    assert all(one[2:] == other[2:] and one[0] != other[0] for one, other in itertools.pairwise(frames))
