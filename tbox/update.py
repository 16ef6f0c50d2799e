"""Updates in the running agent: the engine's thread, what it may know of the vehicle, what it may ask for.

A thin shell: it gathers values from the threads that own them and decides nothing. It is there only where
a boot loader starts the agent from a slot: `tbox boot`, or a Pi's firmware.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from tbox.config import Config, OtaConfig
from tbox.durable import OsStorage, TwoCopies
from tbox.errors import Refused, TboxError
from tbox.flow import BusThread, Flow, PipelineThread
from tbox.ledger import Ledger, StageTotals
from tbox.model import NS_PER_S, Draft, Level, Now, TimeQuality
from tbox.ota import policy
from tbox.ota.audit import KEY_NAME, AuditLog, open_key
from tbox.ota.boot import SLOT_NAMES, BootControl, SlotName, SlotState
from tbox.ota.bootctl import BootCtl
from tbox.ota.device import JOURNAL_STEM, Held, OtaDevice, Progress, load_journal
from tbox.ota.engine import Device, Engine
from tbox.ota.model import Delta, Full, Offer, VerifiedTarget
from tbox.ota.policy import Vitals
from tbox.ota.service import OtaThread, installed_versions
from tbox.ota.slots import BootBackend, RpiTrybootBackend, SimBackend, Slots
from tbox.ota.source import SourceSettings, UpdateSource
from tbox.ota.trial import Proof
from tbox.ota.trust import verify_slot_manifest
from tbox.spool.runner import SpoolRunner
from tbox.spool.store import Spool
from tbox.uplink.mqtt import MqttUplink

log = structlog.get_logger()

ROOT_NAME = "root.json"  # the first trusted root, beside the slots
COHORT_KEY_NAME, COHORT_KEY_BYTES = "cohort.key", 32
GLANCE_AGE_S = 0.5  # between the blocks of a download nobody has to be asked anew
FRAMES_AGE_S = 5.0  # a bus without frames for so long is silent
STANDING_KMH_MAX = 1.0
GEAR_PARK = 0.0
PROBE_EVERY_S, PROBE_S = 10.0, 2.0
STOP_S = 5.0  # how long a stop waits for work under way; what is cut off resumes
# What only the software can be blamed for: a record that it made too large to send.
SOFTWARE_DROPS = frozenset({"too_large"})
ONLINE = frozenset({"online", "draining"})


@dataclass(frozen=True)
class Around:
    """What the rest of the agent is to the updates."""

    vehicle: str
    start: int
    ledger: Ledger
    buses: Sequence[BusThread]
    pipeline: PipelineThread
    runner: SpoolRunner
    uplink: MqttUplink
    now: Callable[[], Now]
    emit: Callable[[Draft], None]


class Glance(NamedTuple):
    """The agent at one instant, as copies. spool None: its thread did not answer in time."""

    at_ns: int
    edge: dict[str, Any] | None
    spool: dict[str, Any] | None
    ledger_clean: bool
    frames: int  # received from all buses
    decoded: int


def unaccounted(totals: Mapping[str, StageTotals]) -> set[str]:
    """Return the stages that lost or invented something, or dropped what no world makes them drop."""
    return {
        name
        for name, t in totals.items()
        if t["into"] != t["out"] + t["held"] + t["folded"] + sum(t["dropped"].values())
        or SOFTWARE_DROPS & t["dropped"].keys()
    }


def parked(edge: Mapping[str, Any]) -> bool | None:
    """Return whether the vehicle stands, in P where its gear is known, and no journey is open."""
    speed_kmh = edge["speed_kmh"]
    if speed_kmh is None:
        return None
    gear = edge["gear"]
    return bool(
        speed_kmh < STANDING_KMH_MAX
        and (gear is None or gear == GEAR_PARK)
        and edge["mode"] not in ("city", "highway")
    )


def vitals_of(edge: Mapping[str, Any], disk_free_bytes: int, settings: OtaConfig, now: Now) -> Vitals:
    """Return what the policy wants to know, from the edge's status and the clock."""
    low_v = edge["low_voltage_v"]
    return Vitals(
        parked=parked(edge),
        soc_percent=edge["soc_percent"],
        low_voltage_mv=None if low_v is None else round(low_v * 1000),
        alarm_level=max((alarm["level"] for alarm in edge["alarms"]), default=0),
        disk_free_bytes=disk_free_bytes,
        bearer=settings.bearer,
        local_minute=_minute_of_day(now),
    )


def _minute_of_day(now: Now) -> int | None:
    """Return the minute of the vehicle's local day (its TZ, summer time included), None by an unset clock."""
    if now.wall_ns is None or now.quality is TimeQuality.UNSET:
        return None
    local = time.localtime(now.wall_ns // NS_PER_S)
    return local.tm_hour * 60 + local.tm_min


class Observer:
    """Looks at the agent for the engine. Used by the thread `ota` alone."""

    def __init__(self, around: Around, settings: OtaConfig, directory: str, broker: tuple[str, int]) -> None:
        self._around, self._settings, self._directory = around, settings, directory
        self._broker = broker
        self._glance: Glance | None = None
        self._moved_ns = {"frames": -NS_PER_S * 3600, "decoded": -NS_PER_S * 3600}
        self._probed_ns = -NS_PER_S * 3600
        self._reachable = False

    def glance(self) -> Glance:
        """Return how things stand, at most GLANCE_AGE_S old."""
        now_ns, last = self._around.now().mono_ns, self._glance
        if last is not None and now_ns - last.at_ns < GLANCE_AGE_S * NS_PER_S:
            return last
        edge, spool = self._ask_pipeline(), self._ask_spool()
        # Each account is exact in the thread that owns it, so what balances in either view balances.
        odd = (edge[1] if edge else set()) & (spool[1] if spool else set())
        decoded = self._around.ledger.snapshot()["decode"]["out"]
        frames = sum(bus.reader.counters().received for bus in self._around.buses)
        for name, count, before in (
            ("frames", frames, last.frames if last else 0),
            ("decoded", decoded, last.decoded if last else 0),
        ):
            if count > before:
                self._moved_ns[name] = now_ns
        if odd:
            log.error("ledger_unbalanced", stages=sorted(odd))
        self._glance = Glance(
            now_ns, edge[0] if edge else None, spool[0] if spool else None, not odd, frames, decoded
        )
        return self._glance

    def _ask_pipeline(self) -> tuple[dict[str, Any], set[str]] | None:
        def look(flow: Flow) -> tuple[dict[str, Any], set[str]]:
            return flow.edge.status(), self._odd()

        try:
            return self._around.pipeline.ask(look)
        except TboxError:
            return None

    def _ask_spool(self) -> tuple[dict[str, Any], set[str]] | None:
        try:
            return self._around.runner.call(lambda spool: (Spool.stat(spool), self._odd()))
        except TboxError:
            return None

    def _odd(self) -> set[str]:
        return unaccounted(self._around.ledger.snapshot()) - {"bus"}  # that one is the kernel's own count

    def vitals(self) -> Vitals:
        edge = self.glance().edge
        if edge is None:
            return Vitals()
        free_bytes = shutil.disk_usage(self._directory).free
        return vitals_of(edge, free_bytes, self._settings, self._around.now())

    def proof(self) -> Proof:
        """Return what the agent can show for itself since it started."""
        glance, link = self.glance(), self._around.uplink.status()
        return Proof(
            covered=link.get("state") in ONLINE or self._broker_reachable(glance.at_ns),
            bus_alive=self._recently("frames", glance.at_ns),
            decoding=self._recently("decoded", glance.at_ns),
            spool_writable=glance.spool is not None and glance.spool["state"] == "flash",
            acked=link.get("acked", 0) > 0,
            ledger_clean=glance.ledger_clean,
            alarm_level=max((a["level"] for a in glance.edge["alarms"]), default=0) if glance.edge else 0,
        )

    def _recently(self, what: str, now_ns: int) -> bool:
        return now_ns - self._moved_ns[what] < FRAMES_AGE_S * NS_PER_S

    def _broker_reachable(self, now_ns: int) -> bool:
        """Whether a plain connection comes about though the uplink has none: then it is not coverage."""
        if now_ns - self._probed_ns >= PROBE_EVERY_S * NS_PER_S:
            self._probed_ns = now_ns
            try:
                socket.create_connection(self._broker, PROBE_S).close()
                self._reachable = True
            except OSError:
                self._reachable = False
        return self._reachable


# --- what the engine may ask for -----------------------------------------------------------------------


@dataclass
class Ports:
    """`ota.device.Ports` of the agent."""

    around: Around
    observer: Observer
    source: UpdateSource
    audit: AuditLog
    rxswin: str
    on_trial: bool  # when it was started; a proof costs questions to other threads
    stopping: threading.Event = field(default_factory=threading.Event)
    restart_command: list[str] | None = None
    waits_for_network: bool = False
    tell_progress: Callable[[int, int], None] = lambda done, total: None

    def check(self) -> Offer:
        with self._network():
            return self.source.check(self.around.now())

    def fetch(self, target: VerifiedTarget, artifact: Full | Delta, hold: Callable[[], str]) -> str:
        if self.stopping.is_set():
            raise Held("the agent stops")
        with self._network():
            return self.source.fetch(artifact, hold, self.tell_progress)

    @contextmanager
    def _network(self) -> Iterator[None]:
        self.waits_for_network = True
        try:
            yield
        finally:
            self.waits_for_network = False

    def vitals(self) -> Vitals:
        """Nothing is known to an agent that stops: so nothing new is begun, and a download is held."""
        return Vitals() if self.stopping.is_set() else self.observer.vitals()

    def proof(self) -> Proof:
        if not self.on_trial or self.stopping.is_set():
            return NO_PROOF
        return self.observer.proof()

    def emit(self, draft: Draft) -> None:
        """Sign the decision into the audit log and send it as a record, the log's newest hash with it."""
        try:
            self.audit.append(self.around.now(), str(draft.body["event"]), draft.body, self.rxswin)
        except (TboxError, OSError) as error:
            log.error("audit_failed", why=str(error))
        number, digest = self.audit.head
        body = draft.body | {"audit": {"number": number, "hash": digest}}
        self.around.emit(Draft(draft.kind, draft.level, draft.mono_ns, body))

    def restart(self, command: Sequence[str]) -> None:
        self.restart_command = list(command)


# Without coverage a trial's clock stands still, so this passes no verdict.
NO_PROOF = Proof(
    covered=False, bus_alive=False, decoding=False, spool_writable=False, acked=False, ledger_clean=True
)


# --- putting it together ---------------------------------------------------------------------------------


class Footing(NamedTuple):
    """What this agent was started from, read once, before anything else: its spool asks too."""

    backend: BootBackend
    slots: Slots
    ctl: BootCtl
    control: BootControl
    running: SlotName

    @property
    def on_trial(self) -> bool:
        return self.control.slot(self.running).state in (SlotState.TRIAL, SlotState.LAST_TRY)


def footing(settings: OtaConfig, environment: Mapping[str, str] = os.environ) -> Footing:
    """Return what this agent stands on. Raises TboxError, OSError when boot control does not say."""
    storage = OsStorage()
    backend, slots = started_from(settings, storage, environment)
    ctl = BootCtl(storage, slots.directory)
    return Footing(backend, slots, ctl, ctl.read(), backend.running())


def started_from(
    settings: OtaConfig, storage: OsStorage, environment: Mapping[str, str]
) -> tuple[BootBackend, Slots]:
    """Return the boot loader that starts this agent and the slots it starts from."""
    pi = settings.rpi_tryboot
    if pi is None:
        where = environment.get("TBOX_SLOTS", "")
        return SimBackend(environment), Slots(storage, where, slot_bytes_max=settings.slot_bytes_max)
    devices = {name: pi.slot(name).device for name in SLOT_NAMES}
    return RpiTrybootBackend(storage, pi), Slots(storage, pi.directory, devices, settings.slot_bytes_max)


class Updates:
    """The thread `ota` and its ports, for the agent; made before anything runs."""

    def __init__(
        self,
        config: Config,
        around: Around,
        standing: Footing,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """Raises TboxError, OSError when what updates rest on cannot be read."""
        storage = OsStorage()
        directory = f"{config.device.state_directory}/ota"
        storage.mkdir(directory)
        backend, slots, ctl, control, running = standing
        root = storage.read(f"{slots.directory}/{ROOT_NAME}")
        key = _cohort_key(storage, f"{directory}/{COHORT_KEY_NAME}")
        observer = Observer(around, config.ota, directory, (config.uplink.host, config.uplink.port_in_use))
        self._ports = Ports(
            around, observer,
            _source(config.ota, root, storage, directory, key, around.vehicle),
            AuditLog(
                storage, directory, open_key(storage, f"{directory}/{KEY_NAME}"), around.now(), around.start
            ),
            rxswin=_rxswin(slots, control, running, root),
            on_trial=standing.on_trial,
        )  # fmt: skip
        journal = TwoCopies(storage, directory, JOURNAL_STEM)
        identity = Device(
            around.vehicle, key, running, _missing,
            loader_decides=backend.counts_tries,
            boot_note=environment.get("TBOX_BOOT_NOTE", ""),
            boot_id=backend.boot_id(),
            kind=backend.kind,
        )  # fmt: skip
        engine = Engine(config.ota, identity, control, load_journal(journal))
        self._device = OtaDevice(engine, ctl, slots, journal, backend, self._ports, tries=config.ota.tries)
        self._ports.tell_progress = self._progress
        self._thread = OtaThread(self._device, around.now, self._ports.emit)
        self._beat = 0

    def _progress(self, done_bytes: int, total_bytes: int) -> None:
        self._device.progress = Progress("download", done_bytes, total_bytes)

    @property
    def beat(self) -> int:
        """Advances with the thread. Waits for the network have deadlines of their own and count as alive."""
        if self._ports.waits_for_network:
            self._beat += 1
        return self._thread.beat + self._beat

    @property
    def restart_command(self) -> list[str] | None:
        """What to run before the agent starts anew, [] for nothing; None while no restart is wanted."""
        return self._ports.restart_command

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing more, hold what is under way and end the thread."""
        self._ports.stopping.set()
        self._thread.stop(STOP_S)

    def handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a request of the control socket. Raises Refused."""
        return self._thread.handle(message) | {"rxswin": self._ports.rxswin}


def open_updates(config: Config, around: Around, standing: Footing | Exception) -> Updates | None:
    """Return the updates; None, told as an alarm, where they cannot be had: the vehicle drives on.

    standing: or why there is none. Raises TboxError for an image on trial, which has then failed.
    """
    try:
        if isinstance(standing, Exception):
            raise standing
        return Updates(config, around, standing)
    except (TboxError, OSError) as error:
        log.error("updates_unavailable", why=str(error))
        if isinstance(standing, Footing) and standing.on_trial:
            raise TboxError(f"on trial, and could not be updated any more: {error}") from None
        body = {"event": "broken", "state": "broken", "reason": str(error)}
        around.emit(Draft("ota", Level.ALARM, around.now().mono_ns, body))
        return None


def _missing(requires: Any) -> str:
    return policy.missing_requirement(requires, installed_versions())


def _source(
    settings: OtaConfig, root: bytes, storage: OsStorage, directory: str, key: bytes, vehicle: str
) -> UpdateSource:
    def admits(release: VerifiedTarget) -> bool:
        return policy.cohort_point(key, vehicle, release.sha256) < release.cohort_percent

    source = SourceSettings(
        metadata_url=settings.metadata_url, targets_url=settings.targets_url, fetch=settings.fetch
    )
    return UpdateSource(source, root, storage, directory, settings.hardware_id, admits)


def _cohort_key(storage: OsStorage, path: str) -> bytes:
    """Return this device's own secret, made at the first call, so that nobody can choose its cohorts."""
    key = storage.read(path) if storage.exists(path) else b""
    if len(key) != COHORT_KEY_BYTES:
        key = os.urandom(COHORT_KEY_BYTES)
        storage.write(path, key)
        storage.truncate(path, len(key))
        storage.fsync(path)
        storage.fsync_dir(str(Path(path).parent))
    return key


def _rxswin(slots: Slots, control: BootControl, running: SlotName, root: bytes) -> str:
    """Return the software identification of what runs (UN R156), "" when its metadata does not say."""
    manifest = slots.manifest(running, control.slot(running).manifest_sha256)
    try:
        return verify_slot_manifest(manifest, root).rxswin if manifest else ""
    except Refused:
        return ""
