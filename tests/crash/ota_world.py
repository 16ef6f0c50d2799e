"""A device on a flash in memory: the real engine, installer, boot control and boot loader, driven to rest.

`drive` is both the update itself and the recovery from any state the medium can be in. Nothing is mocked
but what lies outside the OTA room: the metadata comes as a verified offer, the vehicle as values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from tbox.durable import OsStorage, TwoCopies
from tbox.errors import Refused
from tbox.model import NS_PER_S, Draft, Now
from tbox.ota import boot, supervisor
from tbox.ota.boot import BootControl, LastResort, SlotEntry, SlotName, SlotState
from tbox.ota.bootctl import BootCtl
from tbox.ota.device import JOURNAL_STEM, OtaDevice, load_journal
from tbox.ota.engine import Device, Engine
from tbox.ota.install import STEPS, Job, Step, install
from tbox.ota.model import Delta, Full, Offer, RollbackOrder, VerifiedTarget
from tbox.ota.policy import OtaSettings, Vitals
from tbox.ota.slots import SimBackend, Slots
from tbox.ota.trial import Proof
from tests.crash.flash import Flash, Image, Op

FIRMWARE, DATA = "/fw", "/data"
BLOCK_BYTES = 512
POWER_ONS_MAX = 12  # far more than an honest device needs to come to rest
TURNS_MAX = 200
SETTINGS = OtaSettings(trial_crash_free_s=2, trial_limit_s=20, trial_grace_s=2, retry_s=1)
PARKED = Vitals(
    parked=True,
    soc_percent=80.0,
    low_voltage_mv=12_600,
    disk_free_bytes=1 << 30,
    bearer="wifi",
    local_minute=23 * 60,
)
HEALTHY = Proof(
    covered=True, bus_alive=True, decoding=True, spool_writable=True, acked=True, ledger_clean=True
)

Behaviour = Literal["good", "crash", "unhealthy"]


class Violation(AssertionError):
    """The device did what no update engine may."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def target_of(image: bytes, counter: int, **changes: object) -> VerifiedTarget:
    values: dict[str, object] = {
        "name": f"app/{counter}.img",
        "version": f"{counter}.0",
        "kind": "raw",
        "length": len(image),
        "sha256": sha256(image),
        "security_counter": counter,
        "hardware_ids": ("tbox-sim",),
        "full": Full(name=f"app/{counter}.img", length=len(image), sha256=sha256(image), codec="identity"),
    }
    return msgspec.convert(values | changes, VerifiedTarget)


def manifest_of(target: VerifiedTarget) -> bytes:
    return msgspec.json.encode(target)


def verify(manifest: bytes) -> VerifiedTarget:
    try:
        return msgspec.json.decode(manifest, type=VerifiedTarget)
    except msgspec.DecodeError:
        raise Refused("not a manifest") from None


def provisioned(image: bytes, target: VerifiedTarget, slot: SlotName = "a") -> Image:
    """Return the medium of a device that left the factory with one good image."""
    flash = Flash()
    manifest = manifest_of(target)
    slots = Slots(flash, FIRMWARE)
    slots.write(slot, 0, image)
    entry = SlotEntry(
        priority=boot.PRIORITY_ACTIVE,
        successful=True,
        sha256=target.sha256,
        length=target.length,
        version=target.version,
        security_counter=target.security_counter,
        manifest_sha256=slots.put_manifest(slot, manifest),
    )
    control = BootControl(floor=target.security_counter).with_slots(slot, entry)
    BootCtl(flash, FIRMWARE).commit(control)
    return {path: bytes(data) for path, data in flash.files.items()}


@dataclass
class World:
    """One update: what is on offer, how the new image behaves, and with which steps it is installed."""

    old: bytes
    new: bytes
    target: VerifiedTarget
    behaviour: Behaviour = "good"
    download: bytes = b""  # what the artifact's file holds
    orders: tuple[RollbackOrder, ...] = ()
    steps: Sequence[Step] = STEPS
    boot_ctl: Callable[[Flash, str], BootCtl] = BootCtl
    starts: int = 0  # of the new image, over all drives
    drafts: list[Draft] = field(default_factory=list)
    commits: list[tuple[int, BootControl]] = field(default_factory=list)

    @property
    def staged(self) -> Image:
        return {f"{DATA}/download": self.download or self.new}


class Ports:
    def __init__(self, world: World, running_new: bool) -> None:
        self._world = world
        self._proof = HEALTHY
        if running_new and world.behaviour == "unhealthy":
            self._proof = msgspec.structs.replace(HEALTHY, decoding=False)
        self.restarts = 0

    def check(self) -> Offer:
        return Offer(
            target=self._world.target,
            manifest=manifest_of(self._world.target),
            orders=self._world.orders,
        )

    def fetch(self, target: VerifiedTarget, artifact: Full | Delta, hold: Callable[[], str]) -> str:
        assert not hold()
        return f"{DATA}/download"

    def vitals(self) -> Vitals:
        return PARKED

    def proof(self) -> Proof:
        return self._proof

    def emit(self, draft: Draft) -> None:
        self._world.drafts.append(draft)

    def restart(self, command: Sequence[str]) -> None:
        self.restarts += 1


class LoggedBootCtl:
    """Boot control whose finished writes are noted with the operation they ended at."""

    def __init__(self, world: World, flash: Flash) -> None:
        self._inner = world.boot_ctl(flash, FIRMWARE)
        self._world, self._flash = world, flash

    def read(self) -> BootControl:
        return self._inner.read()

    def commit(self, control: BootControl) -> BootControl:
        self._inner.commit(control)
        self._world.commits.append((len(self._flash.log), control))
        return control


class Disk(Flash):
    """The same storage on a real directory; `log` still counts what was written."""

    def __init__(self, top: str) -> None:
        super().__init__()
        self._top, self._os = top, OsStorage()

    def _at(self, path: str) -> str:
        return self._top + path

    def read(self, path: str) -> bytes:
        return self._os.read(self._at(path))

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        self.log.append(Op("write", path))
        self._os.write(self._at(path), data, offset, create=create)

    def truncate(self, path: str, size: int) -> None:
        self._os.truncate(self._at(path), size)

    def fsync(self, path: str) -> None:
        self._os.fsync(self._at(path))

    def fsync_dir(self, path: str) -> None:
        self._os.fsync_dir(self._at(path))

    def exists(self, path: str) -> bool:
        return self._os.exists(self._at(path))

    def size(self, path: str) -> int:
        return self._os.size(self._at(path))

    def read_at(self, path: str, offset: int, length: int) -> bytes:
        return self._os.read_at(self._at(path), offset, length)

    def read_medium(self, path: str, offset: int, length: int) -> bytes:
        return self._os.read_medium(self._at(path), offset, length)

    def put(self, image: Image) -> None:
        """Lay out what stands on the medium."""
        for path, data in image.items():
            Path(self._at(path)).parent.mkdir(parents=True, exist_ok=True)
            Path(self._at(path)).write_bytes(data)


def drive(world: World, flash: Flash) -> tuple[SlotName, bytes]:
    """Switch the device on, again and again until it rests; return the slot that runs and its bytes.

    Raises Violation when nothing boots, what boots is neither old nor new, or it never comes to rest.
    """
    for _ in range(POWER_ONS_MAX):
        ctl = LoggedBootCtl(world, flash)
        slots = Slots(flash, FIRMWARE)
        chosen = supervisor.choose(ctl, slots, verify, {})  # type: ignore[arg-type]
        if isinstance(chosen, LastResort):
            raise Violation(f"nothing boots: {chosen.reasons}")
        slot, target = chosen
        running = flash.read(slots.image_path(slot))[: target.length]
        if running not in (world.old, world.new):
            raise Violation("what boots is neither the old image nor the new one")
        if running == world.new:
            world.starts += 1
            if world.behaviour == "crash":
                continue
        if not run_agent(world, flash, ctl, slots, slot, running == world.new):
            return slot, running
    raise Violation(f"no rest after {POWER_ONS_MAX} starts")


def run_agent(
    world: World, flash: Flash, ctl: LoggedBootCtl, slots: Slots, slot: SlotName, is_new: bool
) -> bool:
    """Run the agent's update thread until it asks for a restart (True) or has nothing left to do."""
    journal = TwoCopies(flash, DATA, JOURNAL_STEM)
    control = ctl.read()
    device = Device("vehicle", b"key", slot, lambda requires: "", kind="raw")
    engine = Engine(SETTINGS, device, control, load_journal(journal))
    ports = Ports(world, is_new)

    def installer(job: Job) -> BootControl:
        return install(job, world.steps)

    ota = OtaDevice(
        engine, ctl, slots, journal, SimBackend({"TBOX_SLOT": slot}), ports,  # type: ignore[arg-type]
        block_bytes=BLOCK_BYTES, installer=installer,
    )  # fmt: skip
    now_ns = NS_PER_S
    for _ in range(TURNS_MAX):
        before = engine.state, len(flash.log)
        ota.turn(Now(now_ns))
        if ota.restarting:
            return True
        now_ns += NS_PER_S
        resting = engine.control.slot(slot).state is SlotState.GOOD
        if resting and (engine.state, len(flash.log)) == before:
            return False
    raise Violation(f"the engine stays {engine.state.value}: {engine.reason}")
