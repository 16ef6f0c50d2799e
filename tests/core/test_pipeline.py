"""The whole way of a frame, from the driver's bytes to a record's, under anything a bus can carry.

Wired as the daemon wires it, without its threads: intake, decode, edge, consent, codec. After every step each
account balances, and the accounts agree with each other: what one room gives the next one takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tbox.bus.intake import Intake
from tbox.decode.database import Database, DbcFile, DecodeSettings, Definition, load_database
from tbox.decode.roles import RoleMap
from tbox.decode.stage import DecodeStage
from tbox.edge.blackbox import BlackBox, BlackBoxSettings, unpack_part
from tbox.edge.isolation import IsolationSettings
from tbox.edge.mode import Context
from tbox.edge.pack import Pack
from tbox.edge.rules import load_rules
from tbox.edge.sampler import Sampler
from tbox.edge.stage import EdgeSettings, EdgeStage
from tbox.flow import Flow, Scribe
from tbox.ledger import Ledger, LedgerImbalance
from tbox.model import (
    CAN_EFF_FLAG,
    CAN_ERR_FLAG,
    CAN_RTR_FLAG,
    FRAME_DTYPE,
    NS_PER_MS,
    NS_PER_S,
    FrameBatch,
    Now,
)
from tbox.record.codec import Minter, decode_payload
from tbox.record.privacy import PrivacyFilter, PrivacySettings
from tbox.sim.simulator import SimSettings, Simulator
from tests import dbcs
from tests.dbcs import Msg

DBC = Path(__file__).parents[2] / "dbc"
OWN = [
    DbcFile(str(DBC / "tbox_bms.dbc"), 0),
    DbcFile(str(DBC / "tbox_vehicle.dbc"), 0),
    DbcFile(str(DBC / "tbox_bms_mux.dbc"), 1),
]
CHANNELS = 3  # 2: a DBC that hypothesis wrote
NOBODYS_CHANNEL = 7
RULES = load_rules("nmc")
CONSENT = PrivacySettings(telemetry=True, captures=True, journeys=True, position=True)
CONTEXT = Context().body().keys()
FAR_NS = 10 * 24 * 3600 * NS_PER_S


def recorded(frames: str) -> npt.NDArray[np.void]:
    """Return what a vehicle sends in three seconds, sentinels of key-on among it."""
    simulator = Simulator(3, msgspec.convert({"frames": frames}, SimSettings))
    return np.concatenate([batch.frames for batch in simulator.frames_until(3 * NS_PER_S)])


DATABASE = load_database(OWN)
LOGS = [recorded("plain"), recorded("mux")]


class Way:
    """One vehicle's rooms in a row. `take` is one turn of the bus thread and the pipeline."""

    def __init__(self, generated: list[Msg]) -> None:
        self.ledger = Ledger()
        self.bus = self.ledger.stage("bus", "frames")
        definitions = [*DATABASE.definitions, *dbcs.load(generated, 2).definitions]
        decode = DecodeStage(Database(definitions), RoleMap.load(), self.ledger, DecodeSettings())
        edge = EdgeSettings(
            isolation=IsolationSettings(mode="send"),
            blackbox=BlackBoxSettings(ring_bytes_max=1_000_000, before_s=5.0, after_s=1.0),
        )
        self.flow = Flow(decode, EdgeStage(decode.catalog, RULES, edge, self.ledger))
        self.intakes = [Intake(channel) for channel in range(CHANNELS)]
        privacy = PrivacyFilter(CONSENT, np.random.default_rng(1).random)
        minter = Minter(1, "car", privacy, guard=nullcontext())
        self.scribe = Scribe(minter, privacy, self.ledger.stage("record", "records"))
        self.drafts = self.sealed = 0
        self.payloads: list[bytes] = []

    def take(self, now: Now, channel: int, frames: npt.NDArray[np.void], t_ns: npt.NDArray[np.int64]) -> None:
        intake = self.intakes[channel]
        intake.counters.received += len(frames)
        batch = intake.batch(frames, t_ns, now.mono_ns)
        if batch is not None:
            self.flow.presses(batch)
        self.keep(self.flow.step(now, batch).drafts, now)

    def keep(self, drafts: list[Any], now: Now) -> None:
        self.drafts += len(drafts)
        for record in self.scribe.records(drafts, now):
            self.payloads.append(record.payload)
            body = decode_payload(record.payload)["body"]
            assert (body if record.kind == "telemetry" else body["context"]).keys() >= CONTEXT
            if record.kind == "capture" and body["event"] == "frames":
                self.sealed += len(unpack_part(body))
        self.check()

    def stop(self, now: Now) -> None:
        self.keep(self.flow.flush(now).drafts, now)
        held = {name: totals["held"] for name, totals in self.ledger.snapshot().items()}
        assert held == dict.fromkeys(held, 0), "what is held at stop is lost with the process"

    def check(self) -> None:
        counters = [intake.counters for intake in self.intakes]
        self.bus.into, self.bus.out = sum(c.into for c in counters), sum(c.out for c in counters)
        self.bus.dropped.clear()
        for one in counters:
            self.bus.dropped.update(one.dropped)
        self.ledger.check()
        of = self.ledger.snapshot()
        assert of["bus"]["out"] == of["decode"]["into"] == of["blackbox"]["into"]
        assert of["blackbox"]["out"] == self.sealed
        assert of["validity"]["into"] == of["pack"]["into"] == of["sampler"]["into"]
        assert of["pack"]["dropped"].get("refused", 0) == sum(of["validity"]["dropped"].values())
        assert of["record"]["into"] == self.drafts
        assert not of["record"]["dropped"], "all the edge tells fits a record"


# --- what may come ------------------------------------------------------------------------------------

KINDS = (
    "traffic", "traffic", "traffic", "garbage", "generated", "flagged", "lengths", "stuck", "selectors",
    "ones", "bits", "silence", "nobody",
)  # fmt: skip


def frames_of(kind: str, channel: int, rng: np.random.Generator, generated: list[Definition]) -> Any:
    """Return up to some dozen frames of a kind; those of `traffic` are a real vehicle's."""
    count = int(rng.integers(1, 120))
    if kind == "silence":
        return np.zeros(0, FRAME_DTYPE)
    if kind in ("generated", "garbage") or channel == 2:
        if kind == "garbage" or not generated:
            raw = rng.integers(0, 256, count * FRAME_DTYPE.itemsize, dtype=np.uint8)
            return raw.view(FRAME_DTYPE)
        return dbcs.frames_of(rng, generated, count)
    log = LOGS[channel]
    first = int(rng.integers(0, len(log)))
    frames = log[first : first + count].copy()
    some = rng.random(len(frames)) < 0.3
    if kind == "flagged":
        frames["id"][some] |= rng.choice([CAN_ERR_FLAG, CAN_RTR_FLAG, CAN_EFF_FLAG]).astype(np.uint32)
    elif kind == "lengths":
        frames["len"][some] = rng.integers(0, 256)
    elif kind == "stuck":
        frames = np.repeat(frames[:1], count)
    elif kind == "selectors":
        frames["data"][some, : int(rng.integers(1, 4))] = rng.integers(0, 256)
    elif kind == "ones":
        frames["data"][some] = 255
    elif kind == "bits":
        frames["data"][some, int(rng.integers(64))] ^= np.uint8(1 << int(rng.integers(8)))
    return frames


Step = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),  # seed of its frames
    st.sampled_from([10, 10, 100, 100, 1_000, 20_000, 3_600_000, -50, -5_000, -3_600_000]),  # clock moves, ms
    st.sampled_from([0, 0, 0, 1, -1, FAR_NS, -FAR_NS]),  # how far the stamps are off
    st.booleans(),  # whether they run backwards
)


def walk(generated: list[Msg], steps: list[tuple[str, int, int, int, bool]]) -> Way:
    way = Way(generated)
    definitions = list(dbcs.load(generated, 2).definitions)
    clock_ns = 10 * NS_PER_S
    for kind, seed, move_ms, off_ns, backwards in steps:
        clock_ns = max(0, clock_ns + move_ms * NS_PER_MS)
        rng = np.random.default_rng(seed)
        channel = int(rng.integers(0, CHANNELS))
        frames = frames_of(kind, channel, rng, definitions)
        t_ns = clock_ns + off_ns - np.arange(len(frames), dtype=np.int64)[::-1] * NS_PER_MS
        if backwards:
            t_ns = t_ns[::-1].copy()
        now = Now(clock_ns)
        if kind == "nobody":  # a batch of a bus without a DBC, and one that no intake has put in order
            way.intakes[channel].counters.received += len(frames)
            way.keep(way.flow.step(now, FrameBatch(NOBODYS_CHANNEL, frames, t_ns)).drafts, now)
        else:
            way.take(now, channel, frames, t_ns)
    way.stop(Now(clock_ns))
    return way


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(generated=dbcs.databases(), steps=st.lists(Step, max_size=40))
def test_nothing_raises_and_every_frame_sample_and_record_is_accounted_for(
    generated: list[Msg], steps: list[tuple[str, int, int, int, bool]]
) -> None:
    walk(generated, steps)


# --- tests of the test --------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]
ONE_BYTE = [Msg(5, "Byte", 8, [dbcs.Sig("A", 0, 8, False, False, "1", "0")])]


def refused_uncounted(patch: pytest.MonkeyPatch) -> None:
    """The pack forgets to say which samples it did not believe."""
    patch.setattr(Pack, "_count", lambda self, samples, believed: None)


def waiting_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The sampler leaves samples that wait for the next fold where they are, at stop."""
    patch.setattr(Sampler, "flush", lambda self, now, context: [])


def ring_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What the black box holds at stop vanishes."""
    patch.setattr(BlackBox, "flush", lambda self, now: [])


def samples_lost_on_the_way(patch: pytest.MonkeyPatch) -> None:
    """Decode hands on less than it counted."""
    step = DecodeStage.step

    def lossy(self: DecodeStage, now: Now, batch: FrameBatch) -> Any:
        samples = step(self, now, batch)
        kept = slice(1, None)
        return type(samples)(
            samples.t_ns[kept], samples.column[kept], samples.value[kept], samples.validity[kept]
        )

    patch.setattr(DecodeStage, "step", lossy)


@pytest.mark.parametrize(
    "plant",
    [refused_uncounted, waiting_forgotten, ring_forgotten, samples_lost_on_the_way],
    ids=lambda plant: plant.__name__,
)
def test_the_walk_finds_a_planted_bug(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    kinds = [*KINDS, *KINDS, "lengths"]
    steps = [(kind, int(rng.integers(2**32)), 100, 0, False) for kind in kinds]
    walk(ONE_BYTE, steps)
    plant(monkeypatch)
    with pytest.raises((AssertionError, LedgerImbalance)):
        walk(ONE_BYTE, steps)
