"""Bad inputs that every update engine must refuse, each offered to a whole device over real HTTP.

The device is real: metadata client, fetcher, engine, installer, files. The server serves what a publisher
signed unawares, or what nobody signed; whatever it was, the old image runs on and the floor stays.
`ELSEWHERE` names the tests of what needs another vantage point: a raw socket for HTTP itself, a medium for
the state.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bsdiff4
import msgspec
import pytest
import zstandard

from tbox.durable import OsStorage, TwoCopies
from tbox.errors import Refused
from tbox.model import NS_PER_S, Now, TimeQuality
from tbox.ota import boot, image
from tbox.ota.boot import SlotState
from tbox.ota.device import JOURNAL_STEM, OtaDevice, load_journal
from tbox.ota.engine import Device, Engine, Look
from tbox.ota.fetch import FetchSettings
from tbox.ota.model import Offer
from tbox.ota.slots import SimBackend
from tbox.ota.source import SourceSettings, UpdateSource
from tests.core.test_ota_image import HOSTILE
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
    "full disk": ("io.test_fetch", "a_full_disk_is_not_blamed_on_the_server"),
    "EIO": ("io.test_ota_device", "an_installation_that_cannot_write_boot_control_touches_no_slot"),
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

    def run(self) -> list[str]:
        """Let the device try until nothing more comes; return the reasons it gave."""
        control, journal = self.real.ctl.read(), TwoCopies(OsStorage(), str(self.real.data), JOURNAL_STEM)
        identity = Device("vehicle", b"key", "a", lambda requires: "")
        engine = Engine(SETTINGS, identity, control, load_journal(journal))
        device = OtaDevice(
            engine, self.real.ctl, self.real.slots, journal, SimBackend({"TBOX_SLOT": "a"}), self.ports
        )
        for second in range(1, TURNS):
            device.turn(Now(second * NS_PER_S, WALL_NS, TimeQuality.NTP), [Look()])
            if device.restarting:
                break
        return [str(draft.body["reason"]) for draft in self.ports.drafts]

    def check_nothing_came_in(self, reasons: list[str], why: str) -> None:
        control = self.real.ctl.read()
        assert any(why in reason for reason in reasons), reasons
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
    rig.check_nothing_came_in(rig.run(), "is not the signed image")


SERVED = {
    "another file": NEW[:-1] + bytes([NEW[-1] ^ 1]),
    "another header": bytes([NEW[0] ^ 1]) + NEW[1:],
    "a byte more": NEW + b"!",
    "a byte less": NEW[:-1],
    "nothing": b"",
}


@pytest.mark.parametrize("name", SERVED)
def test_a_file_that_is_not_the_signed_one(rig: Rig, name: str) -> None:
    rig.publish(NEW, codec="identity")
    rig.repository.files[PATH] = SERVED[name]
    reasons = rig.run()
    rig.check_nothing_came_in(reasons, "signed")
    assert not (rig.real.fw / "slot_b.img").exists(), "a byte of it reached the slot"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hardware_ids": ["other"]}, ""),
        ({"security_counter": 1}, "a downgrade"),
        ({"security_counter": None}, "security_counter"),
        ({"security_counter": 0}, "security_counter"),
        ({"length": -1}, "length"),
        ({"length": len(NEW) - 1}, "longer than the signed"),
        ({"length": len(NEW) + 1}, "of the signed"),
        ({"length": 1 << 40}, "length"),
        ({"sha256": "0" * 64}, "is not the signed image"),
    ],
    ids=str,
)
def test_signed_fields_that_do_not_fit(rig: Rig, fields: dict[str, Any], why: str) -> None:
    rig.publish(NEW, codec="identity", **fields)
    rig.check_nothing_came_in(rig.run(), why)


def test_a_counter_that_is_lower_than_the_floor(rig: Rig) -> None:
    control = rig.real.ctl.read()
    rig.real.ctl.commit(msgspec.structs.replace(control, floor=5))
    rig.publish(NEW, codec="identity", security_counter=4)
    assert any("a downgrade" in reason for reason in rig.run())
    assert rig.real.ctl.read().b.state is SlotState.EMPTY and rig.ports.restarts == []


def test_a_field_that_nobody_signed(rig: Rig) -> None:
    rig.publish(NEW, codec="identity", security_counter=1)
    served = rig.repository.served["targets"]
    changed = served[-1].replace(b'"security_counter":1', b'"security_counter":2')
    assert changed != served[-1]
    served[-1] = changed
    rig.check_nothing_came_in(rig.run(), "signed by 0 of")


@pytest.mark.parametrize("name", ["zstd bomb", "not zstd", "cut short"])
def test_an_image_packed_to_do_harm(rig: Rig, name: str) -> None:
    packed = zstandard.compress(NEW)
    files = {
        "zstd bomb": zstandard.compress(bytes(64 << 20)),
        "not zstd": RNG.randbytes(5000),
        "cut short": packed[:-9],
    }
    rig.publish(files[name])
    rig.check_nothing_came_in(rig.run(), "")
    written = rig.real.fw / "slot_b.img"
    assert not written.exists() or written.stat().st_size <= len(NEW)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_patch(rig: Rig, name: str) -> None:
    """The full image, tried after it, is none: so whatever comes in came from the patch."""
    rig.publish(RNG.randbytes(100_000), NEW, patch=FORGED[name])
    reasons = rig.run()
    assert PATCH_PATH in reasons, "the patch was never tried"
    rig.check_nothing_came_in(reasons, "")
    written = rig.real.fw / "slot_b.img"
    assert not written.exists() or written.stat().st_size <= len(NEW)


BAD_PATCHES = {
    "wrong base": bsdiff4.diff(OLD[1000:] + OLD[:1000], NEW),
    "trailing bytes": bsdiff4.diff(OLD, NEW) + b"!",
}


@pytest.mark.parametrize("name", BAD_PATCHES)
def test_a_patch_that_does_not_lead_to_the_image_is_followed_by_the_full_one(rig: Rig, name: str) -> None:
    rig.publish(NEW, codec="identity", patch=BAD_PATCHES[name])
    reasons = rig.run()
    assert [reason for reason in reasons if reason in (PATCH_PATH, PATH)] == [PATCH_PATH, PATH]
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


@pytest.mark.parametrize("name", [name for name in HOSTILE if HOSTILE[name]])
def test_an_archive_that_reaches_out_of_its_directory(rig: Rig, name: str, tmp_path: Path) -> None:
    """It is what was signed, so it comes into the slot; nothing of it ever comes out."""
    archive = HOSTILE[name]
    rig.publish(archive, archive, kind="app", codec="identity")
    rig.run()
    assert (rig.real.fw / "slot_b.img").read_bytes() == archive
    tree = tmp_path / "run" / "tree"
    tree.parent.mkdir()
    with pytest.raises(Refused):
        image.unpack(
            lambda offset, length: rig.real.slots.read_at("b", offset, length),
            len(archive), tree, sha256(archive),
        )  # fmt: skip
    assert [path.name for path in tree.parent.iterdir()] in ([], ["tree"])
    assert rig.real.ctl.read().floor == 1
