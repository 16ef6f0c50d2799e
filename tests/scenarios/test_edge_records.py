"""What the edge records of a simulated vehicle, held against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tbox.agent import build_stages
from tbox.edge.blackbox import unpack_part
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, NS_PER_S, Draft, FrameBatch, Now
from tbox.record.codec import Minter, decode_payload
from tbox.sim.faults import Fault, parse_fault
from tbox.sim.simulator import SimSettings, Simulator
from tests.scenarios.test_world import make_config

pytestmark = pytest.mark.slow

STEP_MS = 50
VSS = "Vehicle.Powertrain.TractionBattery."


class Trip:
    """A vehicle, decode and edge for some seconds; every record minted as the daemon would."""

    def __init__(self, seconds: int, settings: SimSettings, faults: Sequence[Fault] = ()) -> None:
        self.ledger = Ledger()
        decode, edge = build_stages(make_config(), self.ledger)
        self.simulator = Simulator(11, settings, faults)
        self.begin = self.simulator.truth()
        self.frames: list[FrameBatch] = []
        minter = Minter(1, "v", guard=nullcontext())
        drafts: list[Draft] = []
        now = Now(0)
        for t_ms in range(STEP_MS, seconds * 1000 + 1, STEP_MS):
            now = Now(t_ms * NS_PER_MS)
            for batch in self.simulator.frames_until(now.mono_ns):
                self.frames.append(batch)
                drafts += edge.step(now, decode.step(now, batch), batch).drafts
        self.estimates = edge.status()["estimates"]
        drafts += edge.flush(now).drafts
        self.payloads = [minter.mint(draft, now).payload for draft in drafts]
        self.records = [decode_payload(payload, expand=True) for payload in self.payloads]
        self.end = self.simulator.truth()

    def bodies(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        bodies = [record["body"] for record in self.records if record["kind"] == kind]
        return [body for body in bodies if all(body.get(key) == value for key, value in wanted.items())]

    def points(self, name: str) -> dict[int, float]:
        """The telemetry of one column: absolute ms -> value."""
        found: dict[int, float] = {}
        for record in self.records:
            for series in record["body"].get("series", ()) if record["kind"] == "telemetry" else ():
                values = series["signals"].get(name, ())
                at_ms = [record["mono"] // NS_PER_MS + t_ms for t_ms in series["t_ms"]]
                found |= {t: value for t, value in zip(at_ms, values, strict=False) if value is not None}
        return found


@pytest.fixture(scope="module")
def ride() -> Trip:
    fault = parse_fault("module-overheat@15s")
    return Trip(70, SimSettings(cycle="demo", cells_hz=5.0), [fault])


@pytest.fixture(scope="module")
def charge() -> Trip:
    return Trip(90, SimSettings(cycle="charge-dc", cells_hz=2.0, soc_percent=30.0))


def test_the_journey_is_as_long_as_the_vehicle_drove(ride: Trip) -> None:
    (end,) = ride.bodies("journey", record="journey", event="end")
    driven_km = (ride.end.distance_m - ride.begin.distance_m) / 1000
    assert end["distance_km"] == pytest.approx(driven_km, rel=0.03)
    assert end["soc_used_points"] == pytest.approx((ride.begin.soc - ride.end.soc) * 100, abs=0.3)
    assert end["energy_kwh"] > 0 and end["battery_max_c"] > 50, "the fault is seen in the temperatures"


def test_the_mode_follows_the_road_and_rides_in_every_record(ride: Trip) -> None:
    modes = [body["to"] for body in ride.bodies("event", event="mode")]
    assert modes[:2] == ["city", "highway"]
    assert {body["mode"] for body in ride.bodies("telemetry")} == {"idle", "city", "highway"}
    assert all("ambient_c" in body for body in ride.bodies("telemetry"))


def test_telemetry_tells_the_speed_and_every_cell_as_they_were(ride: Trip) -> None:
    speed = ride.points("Vehicle.Speed")
    assert max(speed.values()) == pytest.approx(104, abs=3)
    for cell in (0, 95, 191):
        volts = ride.points(f"{VSS}CellVoltage.CellVoltages[{cell}]")
        assert len(volts) > 100
        assert volts[max(volts)] == pytest.approx(float(ride.end.cell_v[cell]), abs=0.05)


def test_no_sample_is_lost_between_the_bus_and_the_records(ride: Trip, charge: Trip) -> None:
    for trip in (ride, charge):
        trip.ledger.check()
        totals = trip.ledger.snapshot()
        assert totals["sampler"]["into"] == totals["validity"]["into"] and totals["sampler"]["held"] == 0
        assert totals["blackbox"]["into"] == sum(map(len, trip.frames))
        assert max(map(len, trip.payloads)) < 48 * 1024


def test_the_alarm_seals_the_very_frames_that_were_on_the_bus(ride: Trip) -> None:
    (begin,), (end,) = ride.bodies("capture", event="begin"), ride.bodies("capture", event="end")
    assert begin["short"] == ["start"], "the ring was younger than thirty seconds"
    parts = [unpack_part(body) for body in ride.bodies("capture", event="frames")]
    sealed = np.concatenate([part.frames for part in parts])
    times = np.concatenate([part.t_ns for part in parts])
    order = np.argsort(times, kind="stable")
    given = np.concatenate([batch.frames for batch in ride.frames])
    given_ns = np.concatenate([batch.t_ns for batch in ride.frames])
    window = (given_ns >= end["from_ns"]) & (given_ns <= end["until_ns"])
    assert np.array_equal(times[order], given_ns[window])
    assert np.array_equal(sealed[order], given[window])
    assert end["until_ns"] - end["from_ns"] > 30 * NS_PER_S


def test_a_fast_charge_is_a_session_in_full_detail(charge: Trip) -> None:
    (end,) = charge.bodies("journey", record="charge", event="end")
    assert end["modes"] == ["charging_dc"] and end["peak_kw"] == pytest.approx(120, abs=3)
    assert end["soc_gained_points"] == pytest.approx((charge.end.soc - charge.begin.soc) * 100, abs=0.5)
    assert end["battery_kwh"] == pytest.approx(end["charger_kwh"], rel=0.05)
    current = [t for t in charge.points(f"{VSS}CurrentCurrent") if t > 20_000]
    assert len(current) == pytest.approx(len(range(20_000, 90_000, 100)), rel=0.05), "ten a second"


def test_the_own_soc_agrees_with_the_truth(ride: Trip) -> None:
    assert ride.estimates["soc_percent"] == pytest.approx(ride.end.soc * 100, abs=3)
