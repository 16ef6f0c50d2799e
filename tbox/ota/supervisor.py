"""The boot loader of the simulator and supervisor on a Pi; it lives outside the slots and never writes one.

`choose` picks what may start and is the secure boot: signed metadata, digest from the medium, counters.
`Supervisor` unpacks, starts, watches and falls back. When both slots are bad it says so and ends; no loop.
"""

from __future__ import annotations

import structlog

from tbox.errors import Refused
from tbox.ota import boot
from tbox.ota.boot import BootControl, GiveUp, LastResort, SlotName, Start
from tbox.ota.bootctl import BootCtl
from tbox.ota.model import VerifiedTarget, VerifyManifest
from tbox.ota.slots import Slots

log = structlog.get_logger()


def inspect(
    control: BootControl, slots: Slots, name: SlotName, verify: VerifyManifest
) -> VerifiedTarget | str:
    """Return the verified target of a slot, or why it may not start. Raises OSError."""
    entry = control.slot(name)
    manifest = slots.manifest(name, entry.manifest_sha256)
    if manifest is None:
        return "its signed metadata is missing or damaged"
    try:
        target = verify(manifest)
    except Refused as error:
        return f"its signed metadata does not hold: {error}"
    problem = boot.mismatch(control, name, target)
    if problem:
        return problem
    if slots.digest(name, target.length) != target.sha256:
        return "the image on the medium is not the signed one"
    return target


def choose(
    ctl: BootCtl, slots: Slots, verify: VerifyManifest
) -> tuple[SlotName, VerifiedTarget] | LastResort:
    """Return the slot to start, its try already counted; or why nothing may start.

    Raises BootControlError, OSError when boot control cannot be read or written.
    """
    rejected: dict[SlotName, str] = {}
    while True:
        control = ctl.read()
        match boot.plan(control, rejected):
            case LastResort() as nothing:
                return nothing
            case GiveUp(slot, reason):
                log.warning("slot_given_up", slot=slot, reason=reason)
                ctl.commit(boot.fail(control, slot, reason))
            case Start(slot, trial):
                try:
                    found = inspect(control, slots, slot, verify)
                except OSError as error:
                    # Not the image's fault for certain: it costs a try, so that it cannot go on for ever.
                    found = f"cannot be read: {error.strerror or error}"
                    rejected[slot] = found
                    if trial:
                        ctl.commit(boot.count_try(control, slot))
                    continue
                if isinstance(found, VerifiedTarget):
                    if trial:
                        ctl.commit(boot.count_try(control, slot))
                    return slot, found
                log.warning("slot_rejected", slot=slot, reason=found)
                if trial:
                    ctl.commit(boot.fail(control, slot, found))
                else:
                    rejected[slot] = found
