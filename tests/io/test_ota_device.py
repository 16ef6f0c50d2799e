"""The update thread on real files: images and deltas arrive exactly, forged ones do not, people are heard."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import bsdiff4
import msgspec
import pytest
import zstandard

from tbox.durable import OsStorage, TwoCopies
from tbox.errors import Refused, TboxError
from tbox.model import Draft, Level, Now
from tbox.ota import boot
from tbox.ota import install as install_module
from tbox.ota.boot import SlotState
from tbox.ota.bootctl import BootCtl
from tbox.ota.device import JOURNAL_STEM, OtaDevice, image_chunks, load_journal
from tbox.ota.engine import Device, Engine
from tbox.ota.install import Job, install
from tbox.ota.model import Delta, Full, Offer, VerifiedTarget
from tbox.ota.policy import OtaSettings, Vitals, missing_requirement
from tbox.ota.service import OtaThread, installed_versions
from tbox.ota.slots import SimBackend, Slots
from tbox.ota.trial import Proof
from tests.crash.ota_world import HEALTHY, PARKED, manifest_of, provisioned, sha256, target_of

RNG = random.Random(9)
OLD = RNG.randbytes(300_000)
NEW = OLD[:100_000] + RNG.randbytes(5_000) + OLD[101_000:]
DELTA = bsdiff4.diff(OLD, NEW)
OTHER_BASE = b"".join(OLD[at : at + 999] + b"!" for at in range(0, len(OLD), 1000))
ZSTD = zstandard.compress(NEW)


def full(data: bytes, codec: str = "zstd") -> Full:
    return msgspec.convert({"name": "n", "length": len(data), "sha256": sha256(data), "codec": codec}, Full)


DELTA_FILE = Delta(base_sha256=sha256(OLD), name="p", length=len(DELTA), sha256=sha256(DELTA))
TARGET = target_of(NEW, 2, full=full(ZSTD), deltas=(DELTA_FILE,))


class Real:
    """A device on a real directory, provisioned with the old image."""

    def __init__(self, top: Path) -> None:
        self.fw, self.data = top / "fw", top / "data"
        for path, content in provisioned(OLD, target_of(OLD, 1)).items():
            (top / path.lstrip("/")).parent.mkdir(exist_ok=True)
            (top / path.lstrip("/")).write_bytes(content)
        self.data.mkdir()
        self.storage = OsStorage()
        self.ctl = BootCtl(self.storage, str(self.fw))
        self.slots = Slots(self.storage, str(self.fw))

    def install(self, artifact: Full | Delta, file: bytes, target: VerifiedTarget = TARGET) -> None:
        path = self.data / "download"
        path.write_bytes(file)
        chunks = image_chunks(self.slots, self.ctl.read(), "a", target, artifact, str(path))
        install(Job(self.ctl, self.slots, "b", target, manifest_of(target), chunks))


@pytest.fixture
def real(tmp_path: Path) -> Real:
    return Real(tmp_path)


@pytest.mark.parametrize(
    ("artifact", "file"),
    [(full(ZSTD), ZSTD), (full(NEW, "identity"), NEW), (DELTA_FILE, DELTA)],
    ids=["zstd", "identity", "delta"],
)
def test_an_image_arrives_exactly(real: Real, artifact: Full | Delta, file: bytes) -> None:
    real.install(artifact, file)
    assert (real.fw / "slot_b.img").read_bytes() == NEW
    assert real.ctl.read().b.state is SlotState.SEALED


def test_a_big_image_shows_life_while_it_is_written_synced_and_read_back(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte on a slow card takes minutes, and the watchdog waits for less."""
    monkeypatch.setattr(install_module, "UNSYNCED_BYTES_MAX", 2 << 20)
    image = RNG.randbytes(5 << 20)
    target = target_of(image, 2)
    steps: list[str] = []
    sync = real.storage.fsync

    def noted(path: str) -> None:
        if path.endswith("slot_b.img"):
            steps.append("sync")
        sync(path)

    monkeypatch.setattr(real.storage, "fsync", noted)
    job = Job(real.ctl, real.slots, "b", target, manifest_of(target), [image])
    job.progress = lambda done_bytes: steps.append(str(done_bytes >> 20))
    install(job)
    assert steps == ["1", "2", "sync", "3", "4", "sync", "5", "sync", "1", "2", "3", "4", "5"]


# name -> the file, and the reason it is refused for
FORGED: dict[str, tuple[Full | Delta, bytes, str]] = {
    "zstd cut short": (full(ZSTD), ZSTD[:-10], "image ends after"),
    "zstd with a flipped bit": (
        full(ZSTD), ZSTD[:5000] + bytes([ZSTD[5000] ^ 1]) + ZSTD[5001:], "is not the signed image"
    ),
    "not zstd": (full(ZSTD), b"not zstd", "cannot unpack"),
    "zstd bomb": (full(ZSTD), zstandard.compress(bytes(200 << 20)), "image is longer than the signed"),
    "one byte more": (full(NEW, "identity"), NEW + b"!", "image is longer than the signed"),
    "one byte less": (full(NEW, "identity"), NEW[:-1], "image ends after"),
    "another image of the same length": (
        full(NEW, "identity"), bytes(len(NEW)), "is not the signed image"
    ),
    "delta for another base": (DELTA_FILE, bsdiff4.diff(OTHER_BASE, NEW), "is not the signed image"),
    "delta to another image": (
        DELTA_FILE, bsdiff4.diff(OLD, NEW[:-1] + bytes([NEW[-1] ^ 1])), "is not the signed image"
    ),
    "empty": (full(ZSTD), b"", "image ends after 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_is_not_the_signed_image_leaves_the_slot_unbootable(real: Real, name: str) -> None:
    before = real.ctl.read()
    artifact, file, why = FORGED[name]
    with pytest.raises(TboxError, match=why):
        real.install(artifact, file)
    after = real.ctl.read()
    assert after.b.state is SlotState.UNBOOTABLE and after.a == before.a and after.floor == before.floor
    written = real.fw / "slot_b.img"
    assert not written.exists() or written.stat().st_size <= len(NEW)
    assert boot.plan(after, {}) == boot.Start("a", trial=False)


def test_an_image_bigger_than_the_slot_is_refused_before_the_slot_is_touched(real: Real) -> None:
    real.slots = Slots(real.storage, str(real.fw), slot_bytes_max=1000)
    before = real.ctl.read()
    with pytest.raises(Refused, match="does not fit"):
        real.install(full(ZSTD), ZSTD)
    assert real.ctl.read() == before


class Ports:
    def __init__(self, real: Real) -> None:
        self._real = real
        self.drafts: list[Draft] = []
        self.restarts: list[list[str]] = []
        self.now_vitals = PARKED
        self.now_proof = HEALTHY

    def check(self) -> Offer:
        return Offer(target=TARGET, manifest=manifest_of(TARGET))

    def fetch(self, target: VerifiedTarget, artifact: Full | Delta, hold: Callable[[], str]) -> str:
        path = self._real.data / "download"
        path.write_bytes(DELTA if isinstance(artifact, Delta) else ZSTD)
        return str(path)

    def vitals(self) -> Vitals:
        return self.now_vitals

    def proof(self) -> Proof:
        return self.now_proof

    def emit(self, draft: Draft) -> None:
        self.drafts.append(draft)

    def restart(self, command: Sequence[str]) -> None:
        self.restarts.append(list(command))


def started(real: Real, ports: Ports, slot: boot.SlotName = "a") -> OtaThread:
    journal = TwoCopies(real.storage, str(real.data), JOURNAL_STEM)
    versions = installed_versions()
    identity = Device(
        "vehicle", b"key", slot, lambda requires: missing_requirement(requires, versions), kind="raw"
    )
    engine = Engine(OtaSettings(), identity, real.ctl.read(), load_journal(journal))
    backend = SimBackend({"TBOX_SLOT": slot})
    device = OtaDevice(engine, real.ctl, real.slots, journal, backend, ports)
    thread = OtaThread(device, lambda: Now(time.monotonic_ns()), ports.emit)
    thread.start()
    return thread


def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


@pytest.mark.slow
def test_the_thread_takes_an_update_to_the_restart_and_the_new_image_to_its_verdict(real: Real) -> None:
    ports = Ports(real)
    thread = started(real, ports)
    until(lambda: bool(ports.restarts))
    thread.stop(60)
    assert ports.restarts == [[]] and (real.fw / "slot_b.img").read_bytes() == NEW
    assert thread.status()["progress"]["done_bytes"] == len(NEW)

    real.ctl.commit(boot.count_try(real.ctl.read(), "b"))  # the boot loader's part
    thread = started(real, ports, "b")
    until(lambda: thread.status()["state"] == "trial")
    assert thread.handle({"do": "confirm"})["state"] == "good"
    with pytest.raises(Refused, match="no image is on trial"):
        thread.handle({"do": "rollback"})
    with pytest.raises(Refused, match="unknown"):
        thread.handle({"do": "explode"})
    thread.stop(60)
    assert real.ctl.read().floor == 2
    assert [draft.body["event"] for draft in ports.drafts][-1] == "passed"


class Failing(OsStorage):
    """A medium that fails one operation on one file."""

    def __init__(self, operation: str, name: str, error: int) -> None:
        def fail(path: str, *rest: object, **more: object) -> object:
            if path.endswith(name):
                raise OSError(error, os.strerror(error))
            return real(path, *rest, **more)

        real = getattr(self, operation)
        setattr(self, operation, fail)


@pytest.mark.parametrize(
    ("operation", "name", "error"),
    [
        ("write", "slot_b.img", errno.ENOSPC),
        ("write", "slot_b.img", errno.EIO),
        ("fsync", "slot_b.img", errno.EIO),
        ("read_medium", "slot_b.img", errno.EIO),
        ("write", "slot_b.manifest", errno.ENOSPC),
        ("read_at", "slot_a.img", errno.EIO),  # the base of the delta
        ("write", "slot_b.img", errno.EROFS),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else value,
)
def test_a_medium_that_fails_is_named_and_the_next_try_arrives(
    real: Real, operation: str, name: str, error: int
) -> None:
    before = real.ctl.read()
    whole, real.slots.storage = real.slots.storage, Failing(operation, name, error)
    with pytest.raises(OSError, match=os.strerror(error)):
        real.install(DELTA_FILE, DELTA)
    after = real.ctl.read()
    assert after.b.state is SlotState.UNBOOTABLE and (after.a, after.floor) == (before.a, before.floor)
    assert boot.plan(after, {}) == boot.Start("a", trial=False)
    real.slots.storage = whole
    real.install(DELTA_FILE, DELTA)
    assert real.ctl.read().b.state is SlotState.SEALED


class WornBootControl(OsStorage):
    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        if "bootctl" in path:
            raise OSError(5, "Input/output error")
        super().write(path, data, offset, create=create)


def test_an_installation_that_cannot_write_boot_control_touches_no_slot(real: Real) -> None:
    ports = Ports(real)
    real.storage = WornBootControl()
    real.ctl = BootCtl(real.storage, str(real.fw))
    thread = started(real, ports)
    until(lambda: thread.status()["state"] == "waiting")
    thread.stop(60)
    assert not (real.fw / "slot_b.img").exists() and real.ctl.read().b.state is SlotState.EMPTY


def test_a_verdict_that_cannot_be_written_ends_updates_with_an_alarm_and_not_the_drive(real: Real) -> None:
    real.install(DELTA_FILE, DELTA)
    real.ctl.commit(boot.count_try(boot.activate(real.ctl.read(), "b"), "b"))
    ports = Ports(real)
    real.storage = WornBootControl()
    real.ctl = BootCtl(real.storage, str(real.fw))
    thread = started(real, ports, "b")
    with pytest.raises(Refused, match="cannot be written"):
        thread.handle({"do": "confirm"})
    until(lambda: thread.status()["state"] == "broken")
    beat = thread.beat
    until(lambda: thread.beat > beat)
    thread.stop(60)
    assert ports.drafts[-1].level == Level.ALARM
    assert real.ctl.read().b.state is SlotState.TRIAL and real.ctl.read().floor == 1
