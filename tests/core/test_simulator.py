"""The simulated vehicle is deterministic to the byte, true on the bus within noise, and its faults show."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cantools
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.model import NS_PER_MS, NS_PER_S, CanSend, FrameBatch
from tbox.sim import layout
from tbox.sim.ecus import BusFaults
from tbox.sim.faults import Fault, make_fault, parse_fault
from tbox.sim.packing import crc8
from tbox.sim.simulator import SimSettings, SimSettingsError, Simulator, Truth, frames_per_s

DBC = Path(__file__).parents[2] / "dbc"
DATABASE = cantools.database.Database()
for _name in ("tbox_bms.dbc", "tbox_vehicle.dbc"):
    DATABASE.add_dbc_file(DBC / _name)
MUX = cantools.database.load_file(DBC / "tbox_bms_mux.dbc")

PLAIN = SimSettings(key_on_sentinels_ms=0)
QUICK = settings(max_examples=10, deadline=None)


class Heard(NamedTuple):
    t_ns: int
    can_id: int
    name: str
    payload: bytes
    signals: dict[str, Any]


def hear(batches: Sequence[FrameBatch], database: Any = DATABASE) -> Iterator[Heard]:
    for batch in batches:
        for frame, t_ns in zip(batch.frames, batch.t_ns.tolist(), strict=True):
            payload = frame["data"][: frame["len"]].tobytes()
            message = database.get_message_by_frame_id(int(frame["id"]))
            yield Heard(
                t_ns, int(frame["id"]), message.name, payload, message.decode(payload, decode_choices=False)
            )


def run(simulator: Simulator, seconds: float) -> list[FrameBatch]:
    return simulator.frames_until(round(seconds * NS_PER_S))


def digest(batches: Sequence[FrameBatch]) -> str:
    mill = hashlib.sha256()
    frames = b"".join(batch.frames.tobytes() for batch in batches)
    mill.update(frames)
    mill.update(b"".join(batch.t_ns.tobytes() for batch in batches))
    return mill.hexdigest()


def request(counter: int, wanted: int = 1) -> CanSend:
    body = bytes([counter, wanted, 7, 1, 0, 0, 0])
    return CanSend(0, 0x6F0, bytes([crc8(body + b"\xf0")]) + body, fd=False)


def of(frames: Sequence[Heard], signal: str) -> list[tuple[int, float]]:
    return [(one.t_ns, one.signals[signal]) for one in frames if signal in one.signals]


# --- determinism ----------------------------------------------------------------------------------------

STORMY = (
    "module-overheat@3s", "cell-runaway@4s", "cell-drift@1s", "sensor-stuck@2s", "sensor-open@2s:cell=3",
    "isolation-loss@3s", "sentinels@5s", "frame-loss@1s:rate=0.2", "crc-errors@2s:rate=0.3",
    "counter-stuck@3s:message=0x100,duration=1s", "bus-silent@6s:duration=300ms",
)  # fmt: skip


def stormy(seed: int, frames: str = "plain") -> Simulator:
    plan = SimSettings(frames=frames, no_fix_s=((2.0, 4.0),))  # type: ignore[arg-type]
    return Simulator(seed, plan, [parse_fault(text) for text in STORMY])


@pytest.mark.parametrize("frames", ["plain", "mux"])
def test_one_seed_gives_the_same_bytes_and_another_seed_others(frames: str) -> None:
    assert digest(run(stormy(7, frames), 8)) == digest(run(stormy(7, frames), 8))
    assert digest(run(stormy(7, frames), 8)) != digest(run(stormy(8, frames), 8))


@QUICK
@given(cuts=st.lists(st.integers(0, 8000), max_size=40), frames=st.sampled_from(["plain", "mux"]))
def test_how_the_time_is_cut_into_calls_does_not_change_a_byte(cuts: list[int], frames: str) -> None:
    simulator = stormy(7, frames)
    batches = [batch for cut in [*sorted(cuts), 8000] for batch in simulator.frames_until(cut * NS_PER_MS)]
    assert digest(batches) == digest(run(stormy(7, frames), 8))


def test_a_generator_shared_by_two_faults_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what one fault draws then depends on how many frames the other saw in the same call."""

    class Shared:
        def __init__(self, rng: np.random.Generator) -> None:
            self._rng = rng

        def spawn(self, count: int) -> list[np.random.Generator]:
            return [self._rng] * count

    def planted(faults: Sequence[Fault], rng: np.random.Generator) -> BusFaults:
        return BusFaults(faults, Shared(rng))  # type: ignore[arg-type]

    monkeypatch.setattr("tbox.sim.simulator.BusFaults", planted)
    simulator = stormy(7)
    cut = [batch for ms in (2002, 8000) for batch in simulator.frames_until(ms * NS_PER_MS)]
    assert digest(cut) != digest(run(stormy(7), 8))


@pytest.mark.slow
def test_long_runs_are_cut_into_chunks_without_a_seam() -> None:
    in_one = run(Simulator(1, PLAIN), 130)
    assert len(in_one) > 1
    simulator = Simulator(1, PLAIN)
    in_many = [batch for second in range(1, 131) for batch in run(simulator, second)]
    assert digest(in_one) == digest(in_many)


def test_time_never_runs_backwards_and_an_earlier_time_gives_nothing() -> None:
    simulator = Simulator(1, PLAIN)
    batches = run(simulator, 5)
    times = np.concatenate([batch.t_ns for batch in batches])
    assert (np.diff(times) >= 0).all() and times[-1] <= 5 * NS_PER_S
    assert run(simulator, 3) == []


# --- the schedule ---------------------------------------------------------------------------------------


def test_every_message_keeps_its_cycle() -> None:
    due = defaultdict(list)
    for one in hear(run(Simulator(1, PLAIN), 10)):
        due[one.name].append(one.t_ns)
    for messages in ("tbox_bms.dbc", "tbox_vehicle.dbc"):
        for msg in layout.DATABASES[messages]:
            if msg is not layout.ISOLATION_REQUEST:
                assert set(np.diff(due[msg.name]).tolist()) == {msg.cycle_ms * NS_PER_MS}, msg.name


@pytest.mark.slow
@pytest.mark.parametrize("rate", [10, 60, 153, 1000, 10_000])
@pytest.mark.parametrize("frames", ["plain", "mux"])
def test_a_rate_of_all_frames_together_is_kept(rate: float, frames: str) -> None:
    simulator = Simulator(1, SimSettings(rate_hz=rate, frames=frames))  # type: ignore[arg-type]
    count = sum(len(batch) for batch in run(simulator, 20))
    assert count == pytest.approx(20 * rate, rel=0.02, abs=20)
    assert simulator.truth().frames == count


def test_the_usual_rate_is_that_of_the_cycles() -> None:
    assert sum(len(batch) for batch in run(Simulator(1, PLAIN), 100)) == pytest.approx(
        100 * frames_per_s(PLAIN), rel=0.001
    )


@pytest.mark.parametrize(("database", "frames"), [(DATABASE, "plain"), (MUX, "mux")])
def test_crcs_hold_and_counters_step_by_one_from_0_to_14(database: Any, frames: str) -> None:
    plan = SimSettings(frames=frames, cells_hz=100)  # type: ignore[arg-type]
    last: dict[int, int] = {}
    for batch in run(Simulator(1, plan), 3):
        for frame in batch.frames:
            can_id, payload = int(frame["id"]), frame["data"][: frame["len"]].tobytes()
            assert payload[0] == crc8(payload[1:] + bytes([can_id & 0xFF]))
            counter = payload[1] & 0x0F
            if can_id in last:
                assert counter == (last[can_id] + 1) % 15
            last[can_id] = counter
    assert max(last.values()) <= 14


# --- truth ----------------------------------------------------------------------------------------------

# Signals and what they should say; the slack is 5 sigma of noise and half a step.
SCALARS: dict[str, tuple[Callable[[Truth], float], float]] = {
    "PackVoltage": (lambda t: t.pack_voltage_v, 0.51),
    "PackCurrent": (lambda t: t.pack_current_a, 0.80),
    "Soc": (lambda t: 100 * t.soc, 0.05),
    "IsolationResistance": (lambda t: t.isolation_kohm, 76.0),
    "CoolantTemperature": (lambda t: t.coolant_c, 0.55),
    "Speed": (lambda t: t.speed_kmh, 0.006),
    "Odometer": (lambda t: t.odometer_km, 0.006),
    "Ignition": (lambda t: t.ignition, 0.0),
    "ChargingState": (lambda t: t.charging, 0.0),
    "ContactorState": (lambda t: t.contactor_state, 0.0),
    "BmsState": (lambda t: t.bms_state, 0.0),
    "Latitude": (lambda t: t.place.latitude_deg, 12 / 111_000),
    "Longitude": (lambda t: t.place.longitude_deg, 12 / 74_000),
}


def with_truths(plan: SimSettings, seconds: float) -> tuple[list[FrameBatch], list[Truth]]:
    simulator = Simulator(1, plan)
    truths, batches = [simulator.truth()], []
    for tick in range(1, round(seconds * 10) + 1):
        batches += simulator.frames_until(tick * 100 * NS_PER_MS)
        truths.append(simulator.truth())
    return batches, truths


@pytest.mark.parametrize("cycle", ["demo", "charge-dc"])
@pytest.mark.parametrize(("frames", "cell_step", "probe_step"), [("plain", 0.001, 0.1), ("mux", 0.001, 0.5)])
def test_every_frame_decodes_to_the_truth_within_noise_and_quantisation(
    cycle: str, frames: str, cell_step: float, probe_step: float
) -> None:
    plan = SimSettings(frames=frames, cycle=cycle, key_on_sentinels_ms=0)  # type: ignore[arg-type]
    batches, truths = with_truths(plan, 20)
    seen: set[str] = set()
    database = DATABASE if frames == "plain" else MUX
    known = {message.frame_id for message in database.messages}
    for batch in batches:
        inside = np.isin(batch.frames["id"], list(known))
        for one in hear([FrameBatch(0, batch.frames[inside], batch.t_ns[inside])], database):
            # A scan's frames follow each other within 4 ms; the scan was taken at the tick before them.
            truth = truths[one.t_ns // (100 * NS_PER_MS)]
            for name, value in one.signals.items():
                kind, _, index = name.rpartition("_")
                if kind == "CellVoltage":
                    assert abs(value - truth.cell_v[int(index)]) <= 0.006 + cell_step / 2
                elif kind == "ProbeTemperature":
                    assert abs(value - truth.probe_c[int(index)]) <= 0.6 + probe_step / 2
                elif name in SCALARS:
                    expected, slack = SCALARS[name]
                    assert abs(value - expected(truth)) <= slack + 1e-9, name
                seen.add(name)
    assert {layout.cell_name(i) for i in range(192)} | {layout.probe_name(j) for j in range(48)} <= seen


def test_noise_is_at_least_a_millivolt_and_a_tenth_of_a_degree() -> None:
    frames = list(hear(run(Simulator(1, SimSettings(cycle="parked")), 60)))
    for name, sigma in (("CellVoltage_007", 0.001), ("ProbeTemperature_07", 0.1)):
        values = np.array([value for _, value in of(frames, name)])
        assert sigma <= values.std() <= 2 * sigma


def test_extremes_are_those_of_the_cells_and_probes_just_sent() -> None:
    cells: dict[int, float] = {}
    probes: dict[int, float] = {}
    checked = 0
    for one in hear(run(Simulator(1, PLAIN), 10)):
        for name, value in one.signals.items():
            kind, _, index = name.rpartition("_")
            if kind in ("CellVoltage", "ProbeTemperature"):
                (cells if kind == "CellVoltage" else probes)[int(index)] = value
        if one.name == "BMS_Extremes":
            assert one.signals["CellVoltageMin"] == min(cells.values())
            assert one.signals["CellVoltageMax"] == max(cells.values())
            assert one.signals["TemperatureMax"] == max(probes.values())
            assert cells[one.signals["CellVoltageMinId"]] == min(cells.values())
            checked += 1
    assert checked == 100


def test_the_position_follows_the_distance_and_is_missing_under_cover() -> None:
    frames = list(hear(run(Simulator(1, SimSettings(cycle="highway", no_fix_s=((30.0, 50.0),))), 60)))
    fixes = [one for one in frames if one.name == "VEH_Position" and one.t_ns > NS_PER_S]
    for one in fixes:
        covered = 30 <= one.t_ns / NS_PER_S < 50
        assert (one.signals["FixState"] == 0) == covered
        assert (one.signals["Latitude"] > 90) == covered


# --- key-on ---------------------------------------------------------------------------------------------


def is_sna(one: Heard, name: str) -> bool:
    msg = next(msg for msgs in layout.DATABASES.values() for msg in msgs if msg.can_id == one.can_id)
    sig = next(sig for sig in msg.signals if sig.name == name)
    return sig.sna is not None and abs(one.signals[name] - (sig.sna * sig.scale + sig.offset)) < 1e-9


def test_after_key_on_there_are_sentinels_for_300_ms_and_then_none() -> None:
    for one in hear(run(Simulator(1), 5)):
        with_sna = [sig for sig in one.signals if sig in ("Soc", "Speed", "PackCurrent", "Odometer", "Gear")
                    or sig.startswith(("CellVoltage_", "Probe"))]  # fmt: skip
        for name in with_sna:
            assert is_sna(one, name) == (one.t_ns < 300 * NS_PER_MS), (one.t_ns, name)


def test_a_parked_vehicle_that_is_woken_sends_its_sentinels_then() -> None:
    frames = list(hear(run(Simulator(1, SimSettings(cycle="charge-ac")), 15)))
    hidden = [one.t_ns for one in frames if one.name == "BMS_Pack" and is_sna(one, "Soc")]
    assert hidden and all(10 * NS_PER_S <= t_ns < 10.3 * NS_PER_S for t_ns in hidden)


def test_contactors_close_after_a_precharge() -> None:
    states = [value for _, value in of(list(hear(run(Simulator(1, PLAIN), 3))), "ContactorState")]
    assert [state for state, after in pairwise(states) if state != after] == [0, 1]
    assert states[-1] == 2


# --- faults on the bus ----------------------------------------------------------------------------------


def test_lost_frames_leave_gaps_in_the_counters_and_are_counted() -> None:
    simulator = Simulator(1, PLAIN, [make_fault("frame-loss", 1.0, rate=0.2, message=0x100)])
    frames = [one for one in hear(run(simulator, 60)) if one.can_id == 0x100]
    gaps = sum((b.signals["AliveCounter"] - a.signals["AliveCounter"] - 1) % 15 for a, b in pairwise(frames))
    assert gaps == pytest.approx(simulator.truth().frames_lost, abs=15)
    assert simulator.truth().frames_lost == pytest.approx(0.2 * 590, rel=0.3)
    assert len(frames) + simulator.truth().frames_lost == 600


def test_crc_errors_are_in_as_many_frames_as_are_counted() -> None:
    simulator = Simulator(1, PLAIN, [make_fault("crc-errors", 1.0, rate=0.1)])
    wrong = sum(
        one.payload[0] != crc8(one.payload[1:] + bytes([one.can_id & 0xFF]))
        for one in hear(run(simulator, 20))
    )
    assert wrong == simulator.truth().frames_damaged > 100


@pytest.mark.parametrize(("frames", "can_id", "database"), [("plain", 0x113, DATABASE), ("mux", 0x118, MUX)])
def test_a_stuck_counter_stands_still_and_then_goes_on_where_it_would_be(
    frames: str, can_id: int, database: Any
) -> None:
    plan = SimSettings(frames=frames)  # type: ignore[arg-type]
    clean = list(hear_id(run(Simulator(1, plan), 6), can_id))
    fault = make_fault("counter-stuck", 2.0, duration_s=2.0, message=can_id)
    stuck = list(hear_id(run(Simulator(1, plan, [fault]), 6), can_id))
    assert len(clean) == len(stuck)
    held = {b for (t, b) in stuck if 2 * NS_PER_S <= t < 4 * NS_PER_S}
    assert len(held) == 1 and held == {[b for t, b in clean if t < 2 * NS_PER_S][-1]}
    assert [one for one in stuck if one[0] >= 4 * NS_PER_S] == [
        one for one in clean if one[0] >= 4 * NS_PER_S
    ]


def hear_id(batches: Sequence[FrameBatch], can_id: int) -> Iterator[tuple[int, int]]:
    """(time, counter) of the frames of one id."""
    for batch in batches:
        for frame, t_ns in zip(batch.frames, batch.t_ns.tolist(), strict=True):
            if int(frame["id"]) == can_id:
                yield t_ns, int(frame["data"][1]) & 0x0F


def test_a_silent_bus_is_silent_and_the_physics_goes_on() -> None:
    simulator = Simulator(1, PLAIN, [make_fault("bus-silent", 2.0, duration_s=3.0)])
    times = np.concatenate([batch.t_ns for batch in run(simulator, 10)])
    assert not ((times >= 2 * NS_PER_S) & (times < 5 * NS_PER_S)).any()
    assert ((times >= 5 * NS_PER_S) & (times < 5.2 * NS_PER_S)).any()
    truth = simulator.truth()
    assert truth.distance_m > 10
    assert truth.frames + truth.frames_lost == 10 * frames_per_s(PLAIN)


def test_a_fault_that_names_a_message_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SimSettingsError, match="0x123"):
        Simulator(1, PLAIN, [make_fault("crc-errors", 0.0, message=0x123)])


# --- the isolation request ------------------------------------------------------------------------------


def test_the_whole_loop_overheats_asks_opens_cools_withdraws_and_drives_on() -> None:
    plan = SimSettings(cycle="highway", key_on_sentinels_ms=0)
    simulator = Simulator(1, plan, [make_fault("module-overheat", 20.0, duration_s=30.0)])
    frames: list[Heard] = []
    for tick in range(1, 900):
        t_ns = tick * 100 * NS_PER_MS
        frames += hear(simulator.frames_until(t_ns))
        if tick % 2 == 0 and 300 <= tick < 640:
            simulator.receive(request(tick // 2 % 15, wanted=int(tick < 620)), t_ns)
    truth = simulator.truth()
    acked = [t_ns for t_ns, ack in of(frames, "IsolationAck") if ack]
    assert 30 * NS_PER_S <= acked[0] <= 30.2 * NS_PER_S and acked[-1] < 62.2 * NS_PER_S
    (opened_ns,) = truth.opened_on_request_ns
    assert 31 * NS_PER_S <= opened_ns <= 33.2 * NS_PER_S
    before = [a for t_ns, a in of(frames, "PackCurrent") if opened_ns - 2 * NS_PER_S < t_ns < opened_ns]
    after = [a for t_ns, a in of(frames, "PackCurrent") if opened_ns < t_ns < 60 * NS_PER_S]
    assert min(before) < -20 and max(map(abs, after)) < 1.0
    hottest = dict(of(frames, "TemperatureMax"))
    assert max(hottest.values()) > 55.0 and list(hottest.values())[-1] < 45.0
    assert truth.requests_refused == 0 and truth.bms_state == 2 and truth.speed_kmh > 10


def test_without_a_request_the_bms_drives_on_whatever_the_temperature() -> None:
    simulator = Simulator(1, SimSettings(cycle="highway"), [make_fault("module-overheat", 10.0)])
    run(simulator, 40)
    assert simulator.truth().probe_c.max() > 60
    assert simulator.truth().bms_state == 2


# --- long runs ------------------------------------------------------------------------------------------


def test_an_idle_hour_at_one_hertz_is_quiet() -> None:
    simulator = Simulator(1, SimSettings.idle_day())
    values: list[float] = []
    for second in range(60, 3601, 60):
        for batch in run(simulator, second):
            cells = batch.frames[(batch.frames["id"] >= 0x110) & (batch.frames["id"] <= 0x117)]
            raw = cells["data"][:, 2:50].copy().view("<u2")
            values += [float(raw[raw < 0xFFFF].min()), float(raw[raw < 0xFFFF].max())]
    assert max(values) - min(values) < 60
    assert simulator.truth().probe_c.max() < 30


def test_a_pack_that_charges_stops_at_its_limit() -> None:
    plan = SimSettings(cycle="charge-dc", soc_percent=90, cells_hz=1, cycle_ms_min=1000, physics_ms=1000)
    simulator = Simulator(1, plan)
    run(simulator, 3600)
    truth = simulator.truth()
    assert 0.93 < truth.soc <= 1.0
    assert truth.cell_v.max() < 4.25
    assert truth.pack_current_a < 30


@pytest.mark.slow
@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
def test_a_cold_pack_is_charged_without_a_swing(chemistry: str) -> None:
    """Its resistance is high: a charger that followed the cells at once would drive them up and down."""
    wanted = {
        "chemistry": chemistry,
        "cycle": "charge-dc",
        "soc_percent": 85,
        "pack_c": 5.0,
        "physics_ms": 200,
    }
    simulator = Simulator(1, msgspec.convert(wanted, SimSettings))
    highest, currents = 0.0, []
    for tick in range(1, 6000):
        run(simulator, tick * 0.2)
        truth = simulator.truth()
        highest = max(highest, float(truth.cell_v.max()))
        currents.append(truth.pack_current_a)
    assert highest < {"NMC": 4.23, "LFP": 3.63}[chemistry]
    assert max(abs(b - a) for a, b in pairwise(currents[100:])) < 5.0


@pytest.mark.slow
def test_the_bms_counts_charge_with_the_gain_error_it_has() -> None:
    plan = SimSettings(cycle="highway", current_gain=1.1, soc_error_percent=5, key_on_sentinels_ms=0)
    simulator = Simulator(1, plan)
    first = simulator.truth().soc
    frames = list(hear(run(simulator, 230)))
    reported = [value for _, value in of(frames, "Soc")]
    used = first - simulator.truth().soc
    assert reported[0] == pytest.approx(100 * first + 5, abs=0.02)
    assert (reported[0] - reported[-1]) == pytest.approx(110 * used, rel=0.05)
