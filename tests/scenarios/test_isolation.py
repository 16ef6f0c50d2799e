"""The isolation request from end to end: critical, frame, the BMS and its answer, clear, withdrawal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tbox.agent import build_stages
from tbox.bus.spec import BusCounters, Pace
from tbox.bus.writer import BusWriter, NotAllowed
from tbox.config import BusConfig, Config, VehicleConfig
from tbox.edge.isolation import IsolationSettings
from tbox.edge.stage import EdgeSettings
from tbox.flow import Flow
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, CanSend, FrameBatch, Now
from tbox.sim.ecus import BmsState
from tbox.sim.faults import parse_fault
from tbox.sim.layout import ISOLATION_REQUEST_ID
from tbox.sim.simulator import SimSettings, Simulator
from tbox.uplink.session import UplinkSettings

pytestmark = pytest.mark.slow

DBC = Path(__file__).parents[2] / "dbc"
STEP_MS = 50
SECONDS = 180  # the heater sticks for 15 s; the alarm clears a minute after the probes stopped rising


class Wire:
    """What a BusWriter writes to: the simulated BMS at the other end of the bus."""

    name, channel, pace = "wire", 0, Pace.USUAL

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.t_ns = 0
        self.sent: list[CanSend] = []

    def send(self, frame: CanSend) -> None:
        self.sent.append(frame)
        self.simulator.receive(frame, self.t_ns)

    def recv_batch(self, timeout_s: float) -> FrameBatch | None:
        return None

    def counters(self) -> BusCounters:
        return BusCounters()

    def close(self) -> None: ...


class Drive:
    """A module overheats in a city drive; the stages are the daemon's, and so is the writer."""

    def __init__(self, mode: str, allow: tuple[int, ...]) -> None:
        ledger = Ledger()
        dbc = [str(DBC / name) for name in ("tbox_bms.dbc", "tbox_vehicle.dbc")]
        config = Config(
            vehicle=VehicleConfig(id="v"),
            bus=[BusConfig(interface="virtual", channel="v", dbc=dbc, send=allow)],
            uplink=UplinkSettings(),
            edge=EdgeSettings(isolation=msgspec.convert({"mode": mode}, IsolationSettings)),
        )
        self.simulator = Simulator(
            7, SimSettings(cycle="city", loop=True), [parse_fault("module-overheat@10s:duration=15s")]
        )
        self.wire = Wire(self.simulator)
        self.writer = BusWriter(self.wire, config.bus[0].allow)
        self.flow = Flow(*build_stages(config, ledger))
        self.events: list[dict[str, Any]] = []
        self.alarms: list[tuple[str, str]] = []
        self.refused = 0
        for t_ms in range(STEP_MS, SECONDS * 1000, STEP_MS):
            self._step(Now(t_ms * NS_PER_MS))
        ledger.check()

    def _step(self, now: Now) -> None:
        self.wire.t_ns = now.mono_ns
        for batch in [None, *self.simulator.frames_until(now.mono_ns)]:
            for draft in self.flow.step(now, batch, self._send).drafts:
                if draft.body.get("event") == "isolation_request":
                    self.events.append(draft.body)
                if draft.kind == "alarm":
                    self.alarms.append((draft.body["alarm"], draft.body["event"]))

    def _send(self, frame: CanSend) -> None:
        try:
            self.writer.send(frame)
        except NotAllowed:
            self.refused += 1

    @property
    def states(self) -> list[str]:
        return [body["state"] for body in self.events]


def test_it_is_asked_answered_and_withdrawn_with_the_clear_and_the_vehicle_drives_on() -> None:
    drive = Drive("send", (ISOLATION_REQUEST_ID,))
    assert drive.states == ["requested", "acknowledged", "withdrawn"]
    assert ("thermal-runaway", "raise") in drive.alarms and ("thermal-runaway", "clear") in drive.alarms
    truth = drive.simulator.truth()
    assert len(truth.opened_on_request_ns) == 1 and truth.requests_refused == 0
    assert [frame.data[2] for frame in drive.wire.sent][-1] == 0, "the last word is the withdrawal"
    assert truth.bms_state == BmsState.OPERATE and truth.contactor_state == 2


def test_a_dry_run_tells_what_it_would_do_and_the_bus_hears_nothing() -> None:
    drive = Drive("dry_run", (ISOLATION_REQUEST_ID,))
    assert drive.states[0] == "requested" and all(body["dry_run"] for body in drive.events)
    assert drive.wire.sent == [] and drive.writer.sent == drive.refused == 0
    assert drive.simulator.truth().opened_on_request_ns == ()


def test_an_id_that_is_not_on_the_list_never_reaches_the_bus_whatever_the_edge_asks() -> None:
    drive = Drive("send", ())
    assert drive.states[0] == "requested" and "acknowledged" not in drive.states
    assert drive.refused > 1 and drive.wire.sent == []
    assert drive.simulator.truth().opened_on_request_ns == ()
