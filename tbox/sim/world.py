"""The whole chain in virtual time: vehicle, bus, decode, edge, spool, link, broker. It reads no clock.

A driving day takes seconds, and any failure replays from its seed: two runs give identical bytes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from tbox.agent import build_stages
from tbox.config import Config
from tbox.flow import Flow, Scribe
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, NS_PER_S, CanSend, Draft, FrameBatch, Level, Now, Record, TimeQuality
from tbox.record.codec import Minter
from tbox.record.privacy import PrivacyFilter
from tbox.sim.broker import VirtualBroker
from tbox.sim.faults import Fault
from tbox.sim.network import Coverage, LinkModel, VirtualUplink
from tbox.sim.simulator import SimSettings, Simulator
from tbox.spool.store import Spool

STEP_MS = 50
WALL_AT_START_NS = 1_780_000_000 * NS_PER_S  # an instant in 2026; any plausible one does
DRAIN_S_MAX = 3600


@dataclass
class World:
    """One vehicle's world. `run` may be called again to go on; `stop` ends the start in order."""

    config: Config
    directory: str
    seed: int = 1
    start: int = 1
    settings: SimSettings = field(default_factory=SimSettings)
    faults: Sequence[Fault] = ()
    coverage: Coverage = field(default_factory=Coverage)
    link: LinkModel = field(default_factory=LinkModel)
    broker: VirtualBroker = field(default_factory=VirtualBroker)

    def __post_init__(self) -> None:
        dice = random.Random(self.seed)
        self.ledger = Ledger()
        self.simulator = Simulator(self.seed, self.settings, self.faults)
        self.frames_written = 0
        self.sent: list[CanSend] = []
        self._t_ns = 0
        self._tick_ns = 0
        decode, edge = build_stages(self.config, self.ledger)
        privacy = PrivacyFilter(self.config.privacy, dice.random)
        minter = Minter(self.start, self.config.vehicle.id, privacy, guard=nullcontext())
        self.flow = Flow(decode, edge)
        self._scribe = Scribe(minter, privacy, self.ledger.stage("record", "records"))
        self.spool = Spool.open(
            self.directory, self.config.spool, start=self.start, now=self.now, ledger=self.ledger,
            mint=lambda draft: self._scribe.record(draft, self.now), random=dice.randbytes,
        )  # fmt: skip
        self.uplink = VirtualUplink(
            self.config.uplink.session, self, self.broker, vehicle=self.config.vehicle.id, start=self.start,
            last_id=lambda: minter.last_id, random=dice.random, model=self.link, coverage=self.coverage,
        )  # fmt: skip
        self._tell({"event": "start", "start": self.start, "previous": None})
        self.uplink.start(0)

    @property
    def now(self) -> Now:
        return Now(self._t_ns, WALL_AT_START_NS + self._t_ns, TimeQuality.GNSS)

    # --- the spool as the uplink sees it ----------------------------------------------------------------

    @property
    def more(self) -> bool:
        return self.spool.more

    def offer(self, room: int) -> list[Record]:
        return self.spool.offer(self.now, room)

    def ack(self, ids: Sequence[int]) -> None:
        self.spool.ack(ids)

    def requeue(self) -> None:
        self.spool.requeue()

    # --- time -------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Let `seconds` of virtual time pass."""
        end_ns = self._t_ns + round(seconds * NS_PER_S)
        while self._t_ns < end_ns:
            self._t_ns += STEP_MS * NS_PER_MS
            batches = self.simulator.frames_until(self._t_ns)
            self.frames_written += sum(map(len, batches))
            for batch in batches:
                self._flow_step(batch)
            if not batches:
                self._flow_step(None)
            self._housekeep()

    def stop(self) -> None:
        """End the start in order: flush, say so, drain, close."""
        self._keep(self.flow.flush(self.now).drafts)
        totals = self.ledger.snapshot()
        self._tell({"event": "stop", "ledger": totals})
        self.uplink.stop(self._t_ns)
        until_ns = self._t_ns + DRAIN_S_MAX * NS_PER_S
        while self._housekeep() is not None and self._t_ns < until_ns:
            self._t_ns += STEP_MS * NS_PER_MS
        self.spool.tick(self.now)
        self.ledger.check()
        self.spool.close(self.now, clean=True, ledger_totals=totals)

    def _flow_step(self, batch: FrameBatch | None) -> None:
        self._keep(self.flow.step(self.now, batch, self._send).drafts)

    def _send(self, frame: CanSend) -> None:
        if frame.can_id in self.config.bus[frame.channel].allow:
            self.sent.append(frame)
            self.simulator.receive(frame, self._t_ns)

    def _housekeep(self) -> int | None:
        wake_ns = self.uplink.step(self._t_ns)
        if self._t_ns >= self._tick_ns or self.spool.wants_commit:
            self.spool.tick(self.now)
            self._tick_ns = self._t_ns + self.config.spool.tick_ms * NS_PER_MS
        return wake_ns

    def _tell(self, body: dict[str, object]) -> None:
        self._keep([Draft("event", Level.INFO, self._t_ns, body)])

    def _keep(self, drafts: Sequence[Draft]) -> None:
        self.spool.append(self._scribe.records(drafts, self.now))
