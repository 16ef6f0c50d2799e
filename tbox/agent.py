"""The daemon on one page: build the stages, start, supervise, drain, stop. Read this first. Decides no more.

Threads, and what each alone may touch:

    can-rx-N   one a bus: reads batches and hands them to the pipeline; a full hand-over leaves them in the
               kernel, which counts what it drops
    pipeline   decode and edge state; sends the frames the edge asks for
    spool      gives out ids, encodes records, and alone touches SQLite (spool/runner.py)
    uplink     the pump beside paho's own thread (uplink/mqtt.py)
    ota        the update engine, where `tbox boot` started this (update.py)
    control    one Unix socket; answers from copies or asks the owner
    main       signals, clock, heartbeats, health records, the order of stopping
"""

from __future__ import annotations

import os
import random
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

import tbox
from tbox import kernel
from tbox.bus.reader import open_reader
from tbox.bus.spec import BusCounters
from tbox.bus.writer import BusWriter
from tbox.clock import Deadline, Offset, SystemClock, next_start
from tbox.config import Config
from tbox.control import ControlServer, Feed, Handler, Message, Stream
from tbox.decode.database import DbcFile, load_database
from tbox.decode.roles import RoleMap
from tbox.decode.stage import DecodeStage
from tbox.durable import OsStorage
from tbox.edge.rules import RuleSet, load_rules
from tbox.edge.stage import EdgeStage
from tbox.errors import Refused, TboxError
from tbox.flow import BusThread, Flow, PipelineThread, Scribe
from tbox.gap import FrameGaps, Spans, last_frames
from tbox.health import Health, notify_systemd, process_figures
from tbox.ledger import Ledger, StageTotals
from tbox.model import NS_PER_S, Draft, Level, Now, Record
from tbox.record.codec import Minter, decode_payload
from tbox.record.privacy import PrivacyFilter, vehicle_id
from tbox.spool import look
from tbox.spool.runner import SpoolRunner
from tbox.spool.starts import PreviousStart, highest_start_seen
from tbox.spool.store import Spool
from tbox.uplink.mqtt import MqttUplink

if TYPE_CHECKING:
    from tbox.update import Footing, Updates

log = structlog.get_logger()

SPOOL_TAIL_MAX = 1000

RESTART_DRAIN_S = 2.0  # a restart does not wait long for PUBACKs: the next start goes on where it stopped


def vehicle_name(config: Config) -> str:
    """Return what stands for the vehicle in topics. Raises TboxError when the secret cannot be read."""
    vehicle = config.vehicle
    if vehicle.id:
        return vehicle.id
    try:
        secret = Path(vehicle.secret_file).read_bytes()
    except OSError as error:
        raise TboxError(
            f"cannot read the secret: {error.strerror}",
            where=vehicle.secret_file,
            mend="set [vehicle] secret_file",
        ) from error
    return vehicle_id(vehicle.vin, secret)


def read_rules(config: Config) -> RuleSet:
    """Return the thresholds the configuration names. Raises RuleError naming file and line."""
    return load_rules(config.rules.chemistry, config.rules.files)


def build_stages(config: Config, ledger: Ledger) -> tuple[DecodeStage, EdgeStage]:
    """Load DBCs, role maps and rules. Raises TboxError for the first that a person must mend."""
    files = [DbcFile(path, channel) for channel, bus in enumerate(config.bus) for path in bus.dbc]
    database = load_database(files, strict=config.decode.strict)
    for where, line, what in database.mends:
        log.warning("dbc_mended", file=f"{where}:{line}", what=what)
    for error in database.errors:
        log.error("dbc_left_out", why=str(error))
    roles = RoleMap.load(config.decode.mapping, defaults=config.decode.default_mapping)
    decode = DecodeStage(database, roles, ledger, config.decode)
    estimators = msgspec.structs.replace(config.edge.estimators, chemistry=config.rules.chemistry)
    settings = msgspec.structs.replace(config.edge, estimators=estimators)
    return decode, EdgeStage(decode.catalog, read_rules(config), settings, ledger)


def _told(previous: PreviousStart) -> dict[str, Any]:
    """Return what a start record says of the start before, and of those whose successor left no record."""
    return {
        "start": previous.start,
        "last_id": previous.last_committed_id,
        "clean": previous.clean,
        "ledger": previous.ledger,
        "earlier": [_told(earlier) for earlier in previous.earlier],
    }


def _make_directory(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TboxError(
            f"cannot be made: {error.strerror}",
            where=path,
            mend="set [device] state_directory to one that can",
        ) from error


def _known_ids(decode: DecodeStage, channel: int) -> frozenset[int]:
    """Return the ids the DBCs of a bus know, for the kernel's filter."""
    return frozenset(d.can_id for d in decode.table.definitions if d.channel == channel)


def _plain(counters: BusCounters) -> dict[str, Any]:
    return {**asdict(counters), "state": counters.state.name}


class Agent:
    """One running T-Box: `start`, then `supervise` every quarter of a second, then `stop`."""

    def __init__(self, config: Config, clock: SystemClock | None = None) -> None:
        """Build every stage. Raises TboxError for whatever a person must mend; nothing runs yet."""
        self.config = config
        self.clock = clock or SystemClock()
        self.ledger = Ledger()
        self.health = Health()
        self.feed = Feed()
        now, self._offset = self.clock.look()
        self._started_ns = now.mono_ns
        self._health_due = Deadline.after(now.mono_ns, config.device.health_s)

        self.vehicle = vehicle_name(config)
        _make_directory(config.device.state_directory)
        self._buses = self.ledger.stage("bus", "frames")
        decode, edge = build_stages(config, self.ledger)
        self._control = ControlServer(config.control_socket, self._handlers())
        self._footing = self._find_footing()
        self._open_spool(now)
        self._gaps = FrameGaps(OsStorage(), config.device.state_directory, self.start_number)

        readers = [
            open_reader(bus, channel, ids=_known_ids(decode, channel))
            for channel, bus in enumerate(config.bus)
        ]
        writers = [BusWriter(reader, bus.allow) for reader, bus in zip(readers, config.bus, strict=True)]
        flow = Flow(decode, edge)
        self.pipeline = PipelineThread(
            flow, writers, self.runner.keep, self.clock.now, self.health.heart("pipeline")
        )
        self.buses = [
            BusThread(
                reader,
                self.pipeline.inbox,
                flow.presses,
                lambda: flow.hurried,
                self.health.heart(f"can-rx-{reader.channel}"),
            )
            for reader in readers
        ]
        self.uplink = MqttUplink(
            config.uplink, self.vehicle, self.runner,
            start=self.start_number, last_id=lambda: self.minter.last_id,
        )  # fmt: skip
        self.updates = self._open_updates()

    def _find_footing(self) -> Footing | Exception | None:
        """Return what a boot loader started this agent from, or why nobody can say; None: none did."""
        if self.config.ota.rpi_tryboot is None and not os.environ.get("TBOX_SLOT"):
            return None
        # Metadata and HTTP libraries take memory that an agent without slots need not spend.
        from tbox.update import footing

        try:
            return footing(self.config.ota)
        except (TboxError, OSError) as error:
            return error

    def _may_migrate(self) -> bool:
        """Whether files may be brought up to this release: not while the one before may have to run again."""
        standing = self._footing
        return standing is None or (not isinstance(standing, Exception) and not standing.on_trial)

    def _open_updates(self) -> Updates | None:
        """Return what keeps this agent up to date, None where no boot loader started it."""
        if self._footing is None:
            return None
        from tbox.update import Around, open_updates

        around = Around(
            self.vehicle, self.start_number, self.ledger, self.buses, self.pipeline, self.runner, self.uplink,
            self.clock.now, lambda draft: self.runner.keep([draft], self.clock.now()),
        )  # fmt: skip
        return open_updates(self.config, around, self._footing)

    def _open_spool(self, now: Now) -> None:
        """Raise the start number, open the spool, and make this start's first record."""
        config = self.config
        directory = config.device.state_directory
        seen = highest_start_seen(config.spool_directory)
        self.start_number = next_start(OsStorage(), directory, seen=seen)
        privacy = PrivacyFilter(config.privacy, random.SystemRandom().random)
        self.minter = Minter(self.start_number, self.vehicle, privacy, guard=nullcontext())
        scribe = Scribe(self.minter, privacy, self.ledger.stage("record", "records"))
        self.spool = Spool.open(
            config.spool_directory, config.spool, start=self.start_number, now=now, ledger=self.ledger,
            mint=lambda draft: scribe.record(draft, self.clock.now()), migrate=self._may_migrate(),
        )  # fmt: skip
        self.runner = SpoolRunner(
            self.spool, scribe.records, self._kept, self.clock.now, self.health.heart("spool"),
            config.spool.tick_ms,
        )  # fmt: skip
        body = {
            "event": "start",
            "start": self.start_number,
            "version": tbox.__version__,
            "previous": None if self.spool.previous is None else _told(self.spool.previous),
        }
        first = Draft("event", Level.INFO, now.mono_ns, body)
        self.runner.keep([first], now)

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        self.runner.start()
        self.pipeline.start()
        for bus in self.buses:
            bus.start()
        self.uplink.start()
        if self.updates is not None:
            self.updates.start()
        self._control.start()
        notify_systemd("READY=1")
        log.info(
            "started",
            start=self.start_number,
            vehicle=self.vehicle,
            buses=[b.reader.name for b in self.buses],
            compiled=kernel.compiled is not None,
        )

    def supervise(self) -> bool:
        """Look after clock, threads and health records; return False when the daemon must restart."""
        now, offset = self.clock.look()
        self._tell_offset(offset)
        self._tell_gaps(now)
        if self._failed() or not self.uplink.alive:
            return False
        self.health.heart("uplink").beats = self.uplink.beat
        if self.updates is not None:
            self.health.heart("ota").beats = self.updates.beat
        if not (stalled := self.health.stalled(now.mono_ns)):
            notify_systemd("WATCHDOG=1")
        else:
            log.error("stalled", threads=stalled)
        if self._health_due.passed(now.mono_ns):
            self._health_due = Deadline.after(now.mono_ns, self.config.device.health_s)
            self._gaps.note(self._spans(), now)
            self.tell("health", **self.figures())
        return True

    @property
    def restart_command(self) -> list[str] | None:
        """What to run before an agent that an update wants to start anew, [] for nothing; else None."""
        return self.updates.restart_command if self.updates is not None else None

    def reload(self) -> None:
        """Take the thresholds anew (SIGHUP). A bad file is refused and told; the old ones go on."""
        try:
            rules = read_rules(self.config)
        except TboxError as error:
            log.error("reload_refused", why=str(error))
            self.tell("event", event="reload", ok=False, why=str(error))
            return
        self.pipeline.ask(lambda flow: flow.edge.reload(rules))
        log.info("reloaded")
        self.tell("event", event="reload", ok=True)

    def stop(self, drain_s: float) -> None:
        """Drain and stop in the order of the flow; what cannot be sent in `drain_s` stays in the spool."""
        notify_systemd("STOPPING=1")
        log.info("stopping")
        if self.updates is not None:
            self.updates.stop()
        if self.restart_command is not None:
            drain_s = min(drain_s, RESTART_DRAIN_S)
        for bus in self.buses:
            bus.stop()
        self.pipeline.stop()
        # Asked of the spool's thread, the ledger holds everything that was handed over before.
        totals = self.totals() if self.runner.failure else self.runner.call(lambda _: self.totals())
        now, spans = self.clock.now(), self._spans()
        self._tell_gaps(now)
        self._gaps.note(spans, now, final=True)
        self.tell("event", event="stop", ledger=totals, last_frames=last_frames(spans, now))
        self.uplink.stop(drain_s)
        self.runner.stop()
        clean = not self._failed()
        self.spool.close(self.clock.now(), clean=clean, ledger_totals=totals)
        self._control.close()
        log.info("stopped", clean=clean)

    def _failed(self) -> bool:
        failures = [bus.failure for bus in self.buses] + [self.pipeline.failure, self.runner.failure]
        return any(failure is not None for failure in failures)

    # --- records --------------------------------------------------------------------------------------

    def _kept(self, records: list[Record]) -> None:
        """Wake the uplink and give a glimpse to whoever tails. Called in the spool's thread."""
        self.uplink.wake()
        if self.feed.wanted:
            for record in records:
                self.feed.publish(decode_payload(record.payload))

    def tell(self, kind: str, **body: Any) -> None:
        """Keep one record of the system itself."""
        now = self.clock.now()
        self.runner.keep([Draft(kind, Level.INFO, now.mono_ns, body)], now)

    def _tell_offset(self, offset: Offset | None) -> None:
        """Say that the wall clock was set or jumped; the first time after the start record."""
        for change in filter(None, (self._offset, offset)):
            self.tell(
                "event", event="offset", wall_ns=change.wall_ns, step_ns=change.step_ns,
                quality=change.quality.name.lower(), first=change.first,
            )  # fmt: skip
        self._offset = None

    def _spans(self) -> Spans:
        return {bus.reader.name: bus.span_ns for bus in self.buses}

    def _tell_gaps(self, now: Now) -> None:
        """Say how long each bus went unheard before this start, once it is heard again."""
        for body in self._gaps.tell(self._spans(), now):
            self.tell("event", **body)

    # --- answers --------------------------------------------------------------------------------------

    def totals(self) -> dict[str, StageTotals]:
        """Return the ledger with the buses' own counts in it."""
        counters = [bus.reader.counters() for bus in self.buses]
        self._buses.into = sum(c.into for c in counters)
        self._buses.out = sum(c.out for c in counters)
        self._buses.dropped.clear()
        for c in counters:
            self._buses.dropped.update({cause: n for cause, n in c.dropped.items() if n})
        return self.ledger.snapshot()

    def figures(self) -> dict[str, Any]:
        """Return what health records and `tbox status` show of the process itself."""
        return {
            "uptime_s": (self.clock.mono_ns() - self._started_ns) // NS_PER_S,
            "process": process_figures(),
            "ledger": self.totals(),
            "bus": {bus.reader.name: _plain(bus.reader.counters()) for bus in self.buses},
            "spool": self.runner.call(Spool.stat),
            "uplink": self.uplink.status(),
        }

    def _handlers(self) -> dict[str, Handler]:
        def status(_message: Message) -> Message:
            return {
                "version": tbox.__version__,
                "vehicle": self.vehicle,
                "start": self.start_number,
                "edge": self.pipeline.ask(lambda flow: flow.edge.status()),
                **self.figures(),
            }

        def tail(_message: Message) -> Stream:
            return self.feed.subscribe(self._control.stopped)

        def reset_alarms(message: Message) -> Message:
            rule = message.get("rule")
            ended = self.pipeline.reset_alarms(str(rule) if rule else None)
            if not ended:
                raise Refused(f"no alarm of {rule} stands" if rule else "no alarm stands")
            return {"ended": ended}

        def ota(message: Message) -> Message:
            if self.updates is None:
                raise Refused("no updates here", mend="start the agent by `tbox boot`, from a slot")
            return self.updates.handle(message)

        def spool_tail(message: Message) -> Message:
            lines = max(1, min(int(message.get("lines", 1)), SPOOL_TAIL_MAX))
            return {"records": self.runner.call(lambda s: s.look(lambda f, k: look.tail(f, k, lines)))}

        return {
            "status": status,
            "tail": tail,
            "reset-alarms": reset_alarms,
            "spool-stat": lambda _m: self.runner.call(Spool.stat),
            "spool-tail": spool_tail,
            "spool-verify": lambda _m: self.runner.call(lambda s: s.look(look.glance)),
            "ota": ota,
        }
