"""Bad inputs that every update engine must refuse, each offered to a whole device over real HTTP.

The device is real: metadata client, fetcher, engine, installer, files. The server serves what a publisher
signed unawares, or what nobody signed; whatever it was, the old image runs on, the floor stays, and the
device says why: to refuse for another reason than the one due is a failure here.
`ELSEWHERE` names the tests of what needs another vantage point: a raw socket for HTTP itself, a medium for
the state.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bsdiff4
import msgspec
import pytest
import zstandard

from tbox.durable import OsStorage, TwoCopies
from tbox.model import NS_PER_S, Now, TimeQuality
from tbox.ota import boot
from tbox.ota.boot import SlotName, SlotState
from tbox.ota.device import JOURNAL_STEM, OtaDevice, load_journal
from tbox.ota.engine import Device, Engine, Look
from tbox.ota.fetch import FetchSettings
from tbox.ota.model import ImageKind, Offer
from tbox.ota.slots import SimBackend
from tbox.ota.source import SourceSettings, UpdateSource
from tests.core.test_ota_image import HOSTILE, SMALL
from tests.core.test_ota_patch import FORGED
from tests.crash.ota_world import SETTINGS, sha256
from tests.io import test_ota_device as real_parts
from tests.io.test_ota_device import NEW, OLD, Real
from tests.tuf_repository import START, Repository, serving

RNG = random.Random(4)
PATH = "app/2.img"
PATCH_PATH = "app/2.bsdiff"
TURNS = 12
WALL_NS = int(START.timestamp()) * NS_PER_S
QUICK = FetchSettings(retries_max=1, retry_s=0.01, retry_s_max=0.02)

# The line of the list -> where the test is, and its name (without "test_").
ELSEWHERE = {
    "signed beyond the first 2 GiB": ("io.test_ota_refusals", "a_byte_beyond_2_gib_is_covered"),
    "headers not covered": (
        "io.test_supervisor", "a_flipped_byte_in_a_good_slot_is_found_and_the_fallback_starts"
    ),
    "200 to a ranged request": ("io.test_fetch", "a_server_without_ranges_begins_anew"),
    "wrong Content-Range, gzip, another host": (
        "io.test_fetch", "a_server_that_lies_is_refused_and_nothing_of_it_kept"
    ),
    "ETag changed mid-resume": (
        "io.test_fetch", "a_file_that_changed_at_a_server_deaf_to_if_range_is_begun_anew"
    ),
    "a byte a minute": ("io.test_fetch", "a_server_that_brings_nothing_is_given_up"),
    "resume on size alone": ("io.test_fetch", "what_is_not_as_it_was_written_down_is_not_built_upon"),
    "crash anywhere": (
        "crash.test_ota_cuts", "no_cut_and_no_second_cut_leave_anything_but_old_or_new"
    ),
    "full disk, downloading": ("io.test_fetch", "a_full_disk_is_not_blamed_on_the_server"),
    "full disk and EIO, installing": (
        "io.test_ota_device", "a_medium_that_fails_is_named_and_the_next_try_arrives"
    ),
    "EIO on boot control": (
        "io.test_ota_device", "an_installation_that_cannot_write_boot_control_touches_no_slot"
    ),
    "read-back mismatch": ("crash.test_ota_cuts", "an_image_that_the_medium_changed_is_never_sealed"),
    "both slots bad": (
        "io.test_supervisor", "last_resort_names_both_reasons_and_recovery_leads_out_of_it"
    ),
    "tries underflow": ("core.test_ota_boot", "every_state_takes_the_events_of_the_table_and_no_other"),
    "an endless install loop": (
        "core.test_ota_engine", "it_gives_up_after_its_attempts_and_does_not_begin_again_after_a_restart"
    ),
    "a floor raised too early": (
        "core.test_ota_boot", "the_floor_rises_only_when_the_image_is_found_good"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ELSEWHERE)
def test_the_other_refusals_have_their_tests(what: str) -> None:
    module, name = ELSEWHERE[what]
    assert callable(getattr(importlib.import_module(f"tests.{module}"), f"test_{name}"))


# The events by which a device tells that it lets metadata or an image in no further.
REFUSALS = {"refused", "fetch-failed", "install-failed", "give-up"}
GIVEN_UP = f"given up after {SETTINGS.attempts_max} attempts"


class Told(NamedTuple):
    """What the device told: in a record and, with the same words, in its audit log."""

    event: str
    reason: str


class Rig:
    """A publisher under a test's control, its server, and a device that was provisioned with OLD."""

    def __init__(self, top: Path, base: str, repository: Repository) -> None:
        self.repository, self.real = repository, Real(top)
        storage = OsStorage()
        settings = SourceSettings(metadata_url=f"{base}/metadata", fetch=QUICK)
        root = repository.served["root"][0]
        self.source = UpdateSource(settings, root, storage, str(top / "ota"), "tbox-sim")
        self.ports = Ports(self.real, self.source)

    def publish(self, file: bytes, made: bytes = NEW, *, patch: bytes | None = None, **custom: Any) -> None:
        """Sign a release whose file is this, and whose image is to be `made`."""
        fields: dict[str, Any] = {
            "version": "2.0", "kind": "raw", "length": len(made), "sha256": sha256(made),
            "security_counter": 2, "hardware_ids": ["tbox-sim"], "critical": True,
        }  # fmt: skip
        if patch is not None:
            self.repository.add_target(PATCH_PATH, patch)
            delta = {"name": PATCH_PATH, "length": len(patch), "sha256": sha256(patch)}
            fields["deltas"] = [{"base_sha256": sha256(OLD), **delta}]
        fields |= custom
        self.repository.add_target(PATH, file, tbox={k: v for k, v in fields.items() if v is not None})
        self.repository.publish_all()

    def run(self, kind: ImageKind = "raw", slot: SlotName = "a") -> list[Told]:
        """Let the device, whose boot loader starts images of `kind`, try until nothing more comes."""
        self.ports.drafts.clear()
        self.ports.restarts.clear()
        control, journal = self.real.ctl.read(), TwoCopies(OsStorage(), str(self.real.data), JOURNAL_STEM)
        identity = Device("vehicle", b"key", slot, lambda requires: "", kind=kind)
        engine = Engine(SETTINGS, identity, control, load_journal(journal))
        device = OtaDevice(
            engine, self.real.ctl, self.real.slots, journal, SimBackend({"TBOX_SLOT": slot}), self.ports
        )
        for second in range(1, TURNS):
            device.turn(Now(second * NS_PER_S, WALL_NS, TimeQuality.NTP), [Look()])
            if device.restarting:
                break
        return [Told(draft.body["event"], draft.body["reason"]) for draft in self.ports.drafts]

    def check_nothing_came_in(self, told: list[Told], event: str, *whys: str) -> None:
        """Hold what the device told against the refusals due, in their order: the first is of this event,
        and for the reason of the last one it goes on to refuse."""
        said = [entry for entry in told if entry.event in REFUSALS]
        assert said and said[0].event == event, told
        for why, entry in zip(whys, said, strict=False):
            assert why in entry.reason, told
        assert len(said) >= len(whys)
        for entry in said[len(whys) :]:
            assert whys[-1] in entry.reason or entry.reason == GIVEN_UP, told
        control = self.real.ctl.read()
        assert self.ports.restarts == [] and control.b.state in (SlotState.EMPTY, SlotState.UNBOOTABLE)
        assert control.floor == 1 and (self.real.fw / "slot_a.img").read_bytes() == OLD
        assert boot.plan(control, {}) == boot.Start("a", trial=False)


class Ports(real_parts.Ports):
    """As the agent's: metadata and files come over HTTP. changed: a file changes after it was verified."""

    def __init__(self, real: Real, source: UpdateSource) -> None:
        super().__init__(real)
        self._source = source
        self.changed = False

    def check(self) -> Offer:
        return self._source.check(Now(NS_PER_S, WALL_NS, TimeQuality.NTP))

    def fetch(self, target: Any, artifact: Any, hold: Any) -> str:
        path = self._source.fetch(artifact, hold)
        if self.changed:
            with Path(path).open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"!")
        return path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    repository = Repository()
    with serving(repository) as base:
        yield Rig(tmp_path, base, repository)


def test_what_is_right_comes_in(rig: Rig) -> None:
    """Without this, a device that refuses everything would pass."""
    rig.publish(zstandard.compress(NEW), patch=bsdiff4.diff(OLD, NEW))
    rig.run()
    assert rig.ports.restarts == [[]] and rig.real.ctl.read().b.state is SlotState.TRIAL
    assert (rig.real.fw / "slot_b.img").read_bytes() == NEW


# --- payload -------------------------------------------------------------------------------------------


def test_a_file_changed_between_verification_and_installation(rig: Rig) -> None:
    rig.publish(NEW, codec="identity")
    rig.ports.changed = True
    rig.check_nothing_came_in(rig.run(), "install-failed", "is not the signed image")


SERVED = {
    "another file": (NEW[:-1] + bytes([NEW[-1] ^ 1]), "what came is not the signed file"),
    "another header": (bytes([NEW[0] ^ 1]) + NEW[1:], "what came is not the signed file"),
    "a byte more": (NEW + b"!", f"is {len(NEW) + 1} bytes, {len(NEW)} are signed"),
    "a byte less": (NEW[:-1], f"is {len(NEW) - 1} bytes, {len(NEW)} are signed"),
    "nothing": (b"", f"is 0 bytes, {len(NEW)} are signed"),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_file_that_is_not_the_signed_one(rig: Rig, name: str) -> None:
    rig.publish(NEW, codec="identity")
    rig.repository.files[PATH], why = SERVED[name]
    rig.check_nothing_came_in(rig.run(), "fetch-failed", why)
    assert not (rig.real.fw / "slot_b.img").exists(), "a byte of it reached the slot"


SIGNED: dict[str, tuple[dict[str, Any], str, str]] = {
    "counter equal": ({"security_counter": 1}, "refused", "counter 1 is not above 1: a downgrade"),
    "counter absent": (
        {"security_counter": None}, "refused", "missing required field `security_counter`"
    ),
    "counter zero": (
        {"security_counter": 0}, "refused", "Expected `int` >= 1 - at `$.security_counter`"
    ),
    "length negative": ({"length": -1}, "refused", "Expected `int` >= 0 - at `$.length`"),
    "length huge": ({"length": 1 << 40}, "refused", f"Expected `int` <= {8 << 30} - at `$.length`"),
    "length of nothing": ({"length": 0}, "refused", "0 bytes do not fit a slot"),
    "length too small": (
        {"length": len(NEW) - 1}, "install-failed", f"longer than the signed {len(NEW) - 1} bytes"
    ),
    "length too big": (
        {"length": len(NEW) + 1}, "install-failed", f"ends after {len(NEW)} of the signed {len(NEW) + 1}"
    ),
    "another digest": ({"sha256": "0" * 64}, "install-failed", "is not the signed image"),
    "another kind": ({"kind": "app"}, "refused", "of kind app, and the boot loader here starts"),
    "a kind nobody knows": ({"kind": "exe"}, "refused", "Invalid enum value 'exe' - at `$.kind`"),
    "a field nobody knows": ({"force": True}, "refused", "unknown field `force`"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
def test_signed_fields_that_do_not_fit(rig: Rig, name: str) -> None:
    fields, event, why = SIGNED[name]
    rig.publish(NEW, codec="identity", **fields)
    rig.check_nothing_came_in(rig.run(), event, why)


def test_an_image_for_wrong_hardware_is_not_even_offered(rig: Rig) -> None:
    """It is refused where the offer is made: the device asks for no file and has nothing to switch to."""
    rig.publish(NEW, codec="identity", hardware_ids=["other"])
    told = rig.run()
    assert {entry.event for entry in told} == {"check", "nothing"}
    assert rig.repository.asked_targets == [] and rig.real.ctl.read().b.state is SlotState.EMPTY
    rig.publish(NEW, codec="identity", hardware_ids=["other", "tbox-sim"])
    assert "offered" in {entry.event for entry in rig.run()}, "it was not for the hardware"


def test_a_counter_that_is_lower_than_the_floor(rig: Rig) -> None:
    control = rig.real.ctl.read()
    rig.real.ctl.commit(msgspec.structs.replace(control, floor=5))
    rig.publish(NEW, codec="identity", security_counter=4)
    told = rig.run()
    assert told[1] == Told("refused", "security counter 4 is not above 5: a downgrade")
    assert rig.real.ctl.read().b.state is SlotState.EMPTY and rig.ports.restarts == []


@pytest.mark.parametrize(("floor_max", "comes"), [(5, True), (4, False)])
def test_a_signed_emergency_permits_a_downgrade_up_to_its_floor_and_no_further(
    rig: Rig, floor_max: int, comes: bool
) -> None:
    rig.real.ctl.commit(msgspec.structs.replace(rig.real.ctl.read(), floor=5))
    emergency = {"floor_max": floor_max, "reason": "5 drains the battery"}
    rig.publish(NEW, codec="identity", security_counter=4, emergency=emergency)
    told = rig.run()
    control = rig.real.ctl.read()
    assert control.floor == 5
    if comes:
        assert rig.ports.restarts == [[]] and control.b.state is SlotState.TRIAL and control.b.emergency
    else:
        assert told[1] == Told("refused", "security counter 4 is not above 5: a downgrade")
        assert control.b.state is SlotState.EMPTY


@pytest.mark.parametrize("forged", [False, True])
def test_an_order_to_leave_a_good_image_is_obeyed_if_it_is_signed(rig: Rig, forged: bool) -> None:
    rig.publish(NEW, codec="identity")
    rig.run()
    good = rig.real.ctl.commit(boot.confirm(boot.count_try(rig.real.ctl.read(), "b"), "b"))
    assert boot.plan(good, {}) == boot.Start("b", trial=False)
    order = {"leave_sha256": sha256(OLD if forged else NEW), "reason": "it drains the battery"}
    rig.repository.targets.unrecognized_fields["tbox"] = {"orders": [order]}
    rig.repository.publish_all()
    if forged:
        served = rig.repository.served["targets"]
        served[-1] = served[-1].replace(sha256(OLD).encode(), sha256(NEW).encode())
    told = rig.run(slot="b")
    control = rig.real.ctl.read()
    assert control.floor == 2
    if forged:
        assert Told("refused", "targets.json: signed by 0 of the 1 keys it takes") in told
        assert rig.ports.restarts == [] and control == good
    else:
        assert Told("ordered", "it drains the battery") in told
        assert boot.plan(control, {}) == boot.Start("a", trial=False) and rig.ports.restarts == [[]]
        failure = control.failure(sha256(NEW))
        assert failure is not None and failure.reason == "ordered: it drains the battery"


def test_a_field_that_nobody_signed(rig: Rig) -> None:
    rig.publish(NEW, codec="identity", security_counter=1)
    served = rig.repository.served["targets"]
    changed = served[-1].replace(b'"security_counter":1', b'"security_counter":2')
    assert changed != served[-1]
    served[-1] = changed
    rig.check_nothing_came_in(rig.run(), "refused", "targets.json: signed by 0 of the 1 keys")


WINDOW = zstandard.ZstdCompressionParameters.from_level(19, window_log=27, enable_ldm=True)
PACKED = {
    "zstd bomb": (zstandard.compress(bytes(64 << 20)), "image is longer than the signed"),
    "not zstd": (RNG.randbytes(5000), "cannot unpack"),
    "cut short": (zstandard.compress(NEW)[:-9], "image ends after"),
    "a window that takes all memory": (
        zstandard.ZstdCompressor(compression_params=WINDOW).compressobj().compress(bytes(64 << 20)),
        "cannot unpack",
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_an_image_packed_to_do_harm(rig: Rig, name: str) -> None:
    file, why = PACKED[name]
    rig.publish(file)
    rig.check_nothing_came_in(rig.run(), "install-failed", why)
    written = rig.real.fw / "slot_b.img"
    assert not written.exists() or written.stat().st_size <= len(NEW)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_patch(rig: Rig, name: str) -> None:
    """The full image, tried after it, is none: so whatever comes in came from the patch.

    The patches are forged against an image of four bytes, as is the one that is signed.
    """
    forgery, why = FORGED[name]
    rig.publish(RNG.randbytes(100_000), b"made", patch=forgery)
    told = rig.run()
    assert [entry.reason for entry in told if entry.event == "go"][:2] == [PATCH_PATH, PATH]
    rig.check_nothing_came_in(told, "install-failed", why, "cannot unpack")
    written = rig.real.fw / "slot_b.img"
    assert not written.exists() or written.stat().st_size <= len(NEW)


BAD_PATCHES = {
    "wrong base": (bsdiff4.diff(OLD[1000:] + OLD[:1000], NEW), "is not the signed image"),
    "trailing bytes": (bsdiff4.diff(OLD, NEW) + b"!", "bytes follow the extra stream"),
}


@pytest.mark.parametrize("name", BAD_PATCHES)
def test_a_patch_that_does_not_lead_to_the_image_is_followed_by_the_full_one(rig: Rig, name: str) -> None:
    patch, why = BAD_PATCHES[name]
    rig.publish(NEW, codec="identity", patch=patch)
    told = rig.run()
    (refusal,) = [entry for entry in told if entry.event in REFUSALS]
    assert refusal.event == "install-failed" and why in refusal.reason
    assert [entry.reason for entry in told if entry.event == "go"] == [PATCH_PATH, PATH]
    assert (rig.real.fw / "slot_b.img").read_bytes() == NEW


@pytest.mark.slow
def test_a_byte_beyond_2_gib_is_covered(tmp_path: Path) -> None:
    slots, length = Real(tmp_path).slots, (1 << 31) + 4096
    path = Path(slots.image_path("a"))
    digests = set()
    for last in (b"\0", b"\1"):
        with path.open("wb") as file:
            file.truncate(length)
            file.seek(length - 1)
            file.write(last)
        digests.add(slots.digest("a", length))
    assert len(digests) == 2 and "" not in digests


# --- archives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (archive, _) in HOSTILE.items() if archive])
def test_an_archive_that_would_harm_is_never_sealed_though_signed(rig: Rig, name: str) -> None:
    archive, why = HOSTILE[name]
    rig.publish(archive, archive, kind="app", codec="identity")
    rig.check_nothing_came_in(rig.run("app"), "install-failed", why)


def test_an_archive_that_does_no_harm_comes_in(rig: Rig) -> None:
    rig.publish(SMALL, SMALL, kind="app", codec="identity")
    rig.run("app")
    assert rig.ports.restarts == [[]] and rig.real.ctl.read().b.state is SlotState.TRIAL
