"""Boot control's encoding: what goes in comes out, and damage is refused, never guessed at."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.ota import boot, bootctl
from tbox.ota.boot import BootControl
from tbox.ota.bootctl import BootControlError, BootCtl
from tests.core.test_ota_boot import FACTORY, GOOD, LAST_TRY, SEALED, TRIAL, UNBOOTABLE
from tests.crash.flash import Flash

ALL = (FACTORY, UNBOOTABLE, SEALED, TRIAL, LAST_TRY, GOOD, boot.fail(TRIAL, "b", "why"))


@pytest.mark.parametrize("control", ALL)
def test_what_is_committed_is_read_back(control: BootControl) -> None:
    flash = Flash()
    BootCtl(flash, "/fw").commit(FACTORY)
    BootCtl(flash, "/fw").commit(control)
    assert BootCtl(flash, "/fw").read() == control


@given(st.sampled_from(ALL), st.data())
def test_a_damaged_payload_is_refused_or_well_formed_but_never_a_crash(
    control: BootControl, data: st.DataObject
) -> None:
    raw = bytearray(bootctl.encode(control))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        found = bootctl.decode(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except BootControlError:
        return
    assert isinstance(found, BootControl)


@given(st.binary(max_size=200))
def test_noise_is_refused(raw: bytes) -> None:
    with pytest.raises(BootControlError):
        bootctl.decode(raw)


def test_contradictions_are_refused() -> None:
    entry = GOOD.b
    for wrong, why in (
        (msgspec.structs.replace(entry, priority=0), "contradicts itself"),
        (msgspec.structs.replace(entry, tries_left=1), "contradicts itself"),
        (msgspec.structs.replace(entry, successful=False, sha256=""), "would start an empty slot"),
    ):
        with pytest.raises(BootControlError, match=why):
            bootctl.decode(bootctl.encode(GOOD.with_slots("b", wrong)))
    both = GOOD.with_slots("a", msgspec.structs.replace(GOOD.a, priority=boot.PRIORITY_ACTIVE))
    with pytest.raises(BootControlError, match="two active"):
        bootctl.decode(bootctl.encode(both))


def test_one_damaged_copy_is_no_loss_and_two_are_said_to_be() -> None:
    flash = Flash()
    ctl = BootCtl(flash, "/fw")
    with pytest.raises(BootControlError, match="no boot control here"):
        ctl.read()
    ctl.commit(FACTORY)
    ctl.commit(SEALED)
    flash.files["/fw/bootctl.0"][30] ^= 1
    assert ctl.read() in (FACTORY, SEALED)
    flash.files["/fw/bootctl.1"][30] ^= 1
    with pytest.raises(BootControlError, match="no whole copy"):
        ctl.read()
