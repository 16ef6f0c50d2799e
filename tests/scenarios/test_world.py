"""The whole chain in virtual time: complete, balanced, and the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tbox.agent import build_stages
from tbox.config import BusConfig, Config, VehicleConfig
from tbox.edge.isolation import IsolationSettings
from tbox.edge.stage import EdgeSettings
from tbox.flow import Flow
from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Now
from tbox.record.privacy import PrivacySettings
from tbox.record.proof import Proof, ProofResult
from tbox.sim.faults import make_fault
from tbox.sim.layout import ISOLATION_REQUEST_ID
from tbox.sim.network import Coverage
from tbox.sim.simulator import SimSettings, Simulator
from tbox.sim.world import World
from tbox.uplink.session import UplinkSettings

DAY_STEP_S = 30
DBC = Path(__file__).parents[2] / "dbc"


def make_config() -> Config:
    dbc = [str(DBC / name) for name in ("tbox_bms.dbc", "tbox_vehicle.dbc")]
    return Config(
        vehicle=VehicleConfig(id="v"),
        bus=[BusConfig(interface="virtual", channel="v", dbc=dbc, send=(ISOLATION_REQUEST_ID,))],
        uplink=UplinkSettings(),
        edge=EdgeSettings(isolation=IsolationSettings(mode="send")),
        privacy=PrivacySettings(journeys=True, position=True),
    )


class Run:
    """A stretch of virtual time, and what the broker got of it."""

    def __init__(self, directory: Path, seed: int, seconds: float) -> None:
        self.messages: list[tuple[int, str, bytes]] = []
        self.world = World(
            make_config(),
            str(directory),
            seed=seed,
            settings=SimSettings(cycle="demo"),
            faults=[make_fault("module-overheat", seconds * 0.3, duration_s=seconds * 0.3)],
            coverage=Coverage([(round(seconds * 0.2) * NS_PER_S, round(seconds * 0.6) * NS_PER_S)]),
        )
        self.world.broker.subscribe(lambda topic, payload, t_ns: self.messages.append((t_ns, topic, payload)))
        self.world.run(seconds)
        self.world.stop()

    def proof(self) -> ProofResult:
        proof = Proof()
        for _, topic, payload in self.messages:
            proof.feed_message(topic, payload)
        return proof.result()


@pytest.fixture(scope="module")
def ride(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("ride") / "spool", seed=7, seconds=90)


def test_every_frame_and_every_record_is_accounted_for(ride: Run) -> None:
    frames = ride.world.ledger.snapshot()["decode"]
    assert frames["into"] == ride.world.frames_written == frames["out"]
    assert frames["dropped"] == {}
    result = ride.proof()
    assert result.ok and result.missing_explained == 0
    assert result.starts[0].end == "stop record"


def test_the_fault_in_the_gap_is_alarmed_and_the_request_reaches_the_bms(ride: Run) -> None:
    topics = {topic.rpartition("/")[2] for _, topic, _ in ride.messages}
    assert {"alarm", "telemetry", "event", "journey", "capture", "state"} <= topics
    assert ride.world.sent
    assert ride.world.simulator.truth().opened_on_request_ns


@pytest.mark.slow
def test_two_runs_with_one_seed_give_identical_bytes_and_another_seed_does_not(
    ride: Run, tmp_path: Path
) -> None:
    again = Run(tmp_path / "again", seed=7, seconds=90)
    assert again.messages == ride.messages
    assert Run(tmp_path / "other", seed=8, seconds=90).messages != ride.messages


@pytest.mark.slow
def test_a_pack_that_only_rests_and_is_noisy_raises_no_alarm_in_a_day() -> None:
    ledger = Ledger()
    flow = Flow(*build_stages(make_config(), ledger))
    simulator = Simulator(3, SimSettings.idle_day())
    alarms, frames = [], 0
    for t_s in range(DAY_STEP_S, 86_400 + 1, DAY_STEP_S):
        now = Now(t_s * NS_PER_S)
        for batch in simulator.frames_until(now.mono_ns):
            frames += len(batch)
            alarms += [draft.body for draft in flow.step(now, batch).drafts if draft.kind == "alarm"]
    ledger.check()
    assert frames > 86_400 * 10
    assert ledger.snapshot()["decode"]["out"] == frames
    assert alarms == []
