"""Slots and boot loaders: what is written is where it should be; a Pi's autoboot.txt changes in one step."""

from __future__ import annotations

import struct

import pytest

from tbox.ota.model import MANIFEST_BYTES_MAX
from tbox.ota.slots import PiSlot, RpiTrybootBackend, SimBackend, SlotError, Slots, TrybootSettings
from tests.crash.flash import Flash, every_cut
from tests.crash.ota_world import sha256


def test_a_digest_is_of_exactly_the_first_bytes() -> None:
    flash = Flash({"/fw/slot_a.img": b"image and more"})
    slots = Slots(flash, "/fw")
    assert slots.digest("a", 5) == sha256(b"image")
    assert slots.digest("a", 99) == "" and slots.digest("b", 5) == ""


def test_a_manifest_is_given_back_only_whole() -> None:
    slots = Slots(Flash(), "/fw")
    assert slots.put_manifest("b", b"a long manifest") == sha256(b"a long manifest")
    digest = slots.put_manifest("b", b"signed")
    assert slots.manifest("b", digest) == b"signed"
    assert slots.manifest("b", sha256(b"another")) is None and slots.manifest("a", digest) is None


def test_an_oversized_manifest_is_not_read() -> None:
    big = bytes(MANIFEST_BYTES_MAX + 1)
    assert Slots(Flash({"/fw/slot_a.manifest": big}), "/fw").manifest("a", sha256(big)) is None


def test_a_block_device_is_written_in_place_and_never_made() -> None:
    flash = Flash({"/dev/mmcblk0p3": bytes(4096)})
    slots = Slots(flash, "/fw", {"b": "/dev/mmcblk0p3"})
    assert slots.capacity_bytes("b") == 4096
    slots.write("b", 512, b"image")
    slots.sync("b")
    assert flash.files["/dev/mmcblk0p3"][512:517] == b"image" and len(flash.files["/dev/mmcblk0p3"]) == 4096
    with pytest.raises(FileNotFoundError):
        Slots(Flash(), "/fw", {"b": "/dev/none"}).write("b", 0, b"image")


def test_the_simulator_s_boot_loader_says_which_slot_runs() -> None:
    assert SimBackend({"TBOX_SLOT": "b"}).running() == "b"
    for environment in ({}, {"TBOX_SLOT": "c"}):
        with pytest.raises(SlotError, match="tbox boot"):
            SimBackend(environment).running()


def pi(flash: Flash) -> RpiTrybootBackend:
    settings = TrybootSettings(
        directory="/fw",
        boot_directory="/boot",
        a=PiSlot(device="/dev/mmcblk0p2", partition=2),
        b=PiSlot(device="/dev/mmcblk0p3", partition=3),
        firmware_node="/node",
    )
    return RpiTrybootBackend(flash, settings)


def test_the_pi_s_firmware_says_which_partition_was_booted() -> None:
    assert pi(Flash({"/node": struct.pack(">I", 3)})).running() == "b"
    with pytest.raises(SlotError, match="partition 7"):
        pi(Flash({"/node": struct.pack(">I", 7)})).running()
    for image in ({}, {"/node": b"\0"}):
        with pytest.raises(SlotError, match="does not say"):
            pi(Flash(image)).running()


def test_a_trial_on_the_pi_keeps_the_default_and_a_good_image_becomes_it() -> None:
    flash = Flash()
    assert pi(flash).arm("b", trial=True) == ["reboot", "0 tryboot"]
    assert flash.files["/boot/autoboot.txt"].decode() == (
        "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"
    )
    pi(flash).settle("b")
    assert b"[all]\ntryboot_a_b=1\nboot_partition=3\n" in flash.files["/boot/autoboot.txt"]
    done = len(flash.log)
    pi(flash).settle("b")
    assert len(flash.log) == done


def test_a_cut_leaves_the_old_autoboot_or_the_new() -> None:
    flash = Flash()
    pi(flash).settle("a")
    start = {path: bytes(data) for path, data in flash.files.items()}
    again = Flash(start)
    pi(again).settle("b")
    whole = {start["/boot/autoboot.txt"], bytes(again.files["/boot/autoboot.txt"])}
    assert {image.get("/boot/autoboot.txt") for _, image in every_cut(start, again.log)} == whole
